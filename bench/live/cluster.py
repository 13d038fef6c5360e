"""Starts a cluster for a measurement, process by process, with a recorded scheduler; pins engines to cores."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

import baton_llm
from bench import cpu
from bench.children import Child, start_child
from bench.live import machines
from launcher.local.child import READY_PREFIX
from launcher.local.environment import CHILD_VARIABLE, child_environment

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
MODEL_NAME = "live"
RECORDING = "scheduler.jsonl"


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What is started. ``settings`` are those of Baton."""

    prefill: int
    decode: int
    settings: Mapping[str, object]
    model: Path
    seed: int = 0

    @property
    def name(self) -> str:
        """As people write it."""
        return f"{self.prefill}P{self.decode}D"

    @property
    def worker_ids(self) -> list[str]:
        """Prefill workers first."""
        counts = {"prefill": self.prefill, "decode": self.decode}
        return [f"{role}-{index}" for role, count in counts.items() for index in range(count)]


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster that serves."""

    shape: Shape
    grpc_address: str
    recording: Path
    # Core of each pinned engine, by worker.
    pinned: Mapping[str, int]


@contextlib.asynccontextmanager
async def running(
    shape: Shape, folder: Path, *, pin_engines: bool = False, cores_an_engine: float = 0.0
) -> AsyncIterator[Cluster]:
    """Start it in ``folder``, which is there and gets the logs and the recording; end all of it afterwards.

    ``cores_an_engine``: what each worker gets with its engine once all are started; 0: what is there.
    """
    environ = child_environment(os.environ, threads=1, model_is_local=True)
    # They end when this process does, however it does.
    environ |= {"PYTHONPATH": baton_llm.FOLDER, CHILD_VARIABLE: "1"}
    recording = folder / RECORDING
    sets = [f"{path}={value}" for path, value in shape.settings.items()]
    sets += [f"engine.model={shape.model}", f"engine.served_model_name={MODEL_NAME}"]
    options = [word for each in sets for word in ("--set", each)]
    children: dict[str, Child] = {}
    ends = contextlib.ExitStack()
    give = ends.enter_context(machines.each_of(cores_an_engine))

    async def start(name: str, argv: Sequence[str]) -> Child:
        children[name] = await start_child(name, argv, environ, folder / f"{name}.log", ready_prefix=READY_PREFIX)
        return children[name]

    # Sockets of vLLM's, which it leaves behind. Their names must be short.
    sockets = tempfile.TemporaryDirectory(prefix="baton-live-", ignore_cleanup_errors=True)
    environ["TMPDIR"] = sockets.name
    try:
        argv = [sys.executable, "-m", "bench.live.scheduler", str(recording), str(shape.seed), *sets]
        address = await _address(await start("scheduler", argv), "grpc_address")
        for worker_id in shape.worker_ids:
            role = worker_id.partition("-")[0]
            await start(worker_id, baton_llm.command(role, "--id", worker_id, "--scheduler", address, *options))
        for worker_id in shape.worker_ids:
            await children[worker_id].wait_ready_words(START_TIMEOUT_S)
        ports = ["--port", "0", "--grpc-port", "0"]
        front = await start("front", baton_llm.command("front-proxy", "--scheduler", address, *ports, *options))
        front_address = await _address(front, "grpc_address")
        pinned = {}
        if pin_engines:
            pinned = {name: _pin(children[name].pid, index) for index, name in enumerate(shape.worker_ids)}
        for name in shape.worker_ids:
            give(name, list(cpu.read([children[name].pid])))
        yield Cluster(shape=shape, grpc_address=front_address, recording=recording, pinned=pinned)
    finally:
        for child in reversed(list(children.values())):
            await child.stop(STOP_TIMEOUT_S)
        ends.close()
        sockets.cleanup()


async def _address(child: Child, name: str) -> str:
    words = await child.wait_ready_words(START_TIMEOUT_S)
    found = msgspec.json.decode(words[1], type=dict[str, str])
    return found[name]


def _pin(worker_pid: int, index: int) -> int:
    """Give the engine of a worker one core: its processes, with all of their threads."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[index % len(cores)]
    below = cpu.read([worker_pid])
    # An engine whose title could not be set is below its worker all the same.
    engines = cpu.engine_pids(below) or below.keys() - {worker_pid}
    assert engines, f"process {worker_pid} has no engine below it"
    for pid in engines:
        for thread in psutil.Process(pid).threads():
            # Threads come and go; one that is new inherits the core.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, {core})
    return core
