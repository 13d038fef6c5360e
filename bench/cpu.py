"""CPU seconds of process trees, engine and everything else apart. Reads counters; starts and stops no process.

The engine is vLLM's child process of that title and all its descendants; all else of the tree is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import psutil

ENGINE_TITLES = ("VLLM::EngineCore", "VLLM::Worker")


class ProcessCpu(msgspec.Struct, frozen=True, kw_only=True):
    """One process and the CPU seconds it has used since it began."""

    pid: int
    parent_pid: int
    title: str
    cpu_s: float


class CpuUse(msgspec.Struct, frozen=True, kw_only=True):
    """CPU seconds used between two readings, by process."""

    engine_s: float
    other_s: float
    other_by_process: Mapping[str, float]


def read(roots: Sequence[int]) -> dict[int, ProcessCpu]:
    """Every live process of the trees that begin at `roots`."""
    found: dict[int, ProcessCpu] = {}
    for root in roots:
        try:
            tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in tree:
            # A process may end between the listing and the reading; it then used nothing that we still can read.
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    title = " ".join(process.cmdline()) or process.name()
                    found[process.pid] = ProcessCpu(
                        pid=process.pid, parent_pid=process.ppid(), title=title, cpu_s=times.user + times.system
                    )
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
    return found


def engine_pids(processes: Mapping[int, ProcessCpu]) -> set[int]:
    """The engine processes: those with the engine's title, and all their descendants."""
    engines = {pid for pid, process in processes.items() if process.title.startswith(ENGINE_TITLES)}
    for _ in range(len(processes)):
        children = {pid for pid, process in processes.items() if process.parent_pid in engines} - engines
        if not children:
            break
        engines |= children
    return engines


def used(before: Mapping[int, ProcessCpu], after: Mapping[int, ProcessCpu]) -> CpuUse:
    """What was used between two readings. A process that began in between counts from its beginning."""
    engines = engine_pids(after)
    engine_s = other_s = 0.0
    by_process: dict[str, float] = {}
    for pid, process in after.items():
        start_s = before[pid].cpu_s if pid in before else 0.0
        spent_s = process.cpu_s - start_s
        assert spent_s >= -1e-6, (process, start_s)
        if pid in engines:
            engine_s += spent_s
        else:
            other_s += spent_s
            by_process[f"{pid} {process.title[:120]}"] = spent_s
    return CpuUse(engine_s=engine_s, other_s=other_s, other_by_process=by_process)
