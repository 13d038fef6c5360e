"""What the kernel says about processes and shared memory, from /proc. Removes only files it is told to."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

_PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - not a temporary file of ours: where POSIX keeps shared memory
_DELETED = " (deleted)"


class ProcessFacts(msgspec.Struct, frozen=True):
    """One line of /proc/PID/stat, as far as it matters here."""

    pid: int
    state: str
    group: int
    start_ticks: int


def facts(pid: int) -> ProcessFacts | None:
    """What runs as ``pid``; None when nothing does."""
    try:
        # A process may give itself any bytes as its name, and the kernel cuts a long one anywhere.
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    rest = text.rpartition(")")[2].split()
    return ProcessFacts(pid=pid, state=rest[0], group=int(rest[2]), start_ticks=int(rest[19]))


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether the process that had ``pid`` at ``start_ticks`` still runs; a zombie does not."""
    found = facts(pid)
    return found is not None and found.state not in "ZX" and start_ticks in (0, found.start_ticks)


def group_members(group: int) -> list[int]:
    """Pids of the living processes of one process group."""
    pids = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    found = (facts(pid) for pid in pids)
    return [one.pid for one in found if one is not None and one.group == group and one.state not in "ZX"]


def is_resource_tracker(pid: int) -> bool:
    """Whether ``pid`` is Python's helper that unlinks shared memory and semaphores once their makers are gone."""
    try:
        return b"multiprocessing.resource_tracker" in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def wait_until_gone(pids: Iterable[int], timeout_s: float) -> None:
    """Block until all ``pids`` have ended, ``timeout_s`` at most."""
    deadline_s = time.monotonic() + timeout_s
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue  # gone already
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
        finally:
            os.close(fd)


def shared_memory_of(pids: Iterable[int]) -> set[Path]:
    """Files in /dev/shm that any of ``pids`` maps or has open."""
    return {path for pid in pids for path in (*_mapped(pid), *_opened(pid))}


def remove_unused(files: Iterable[Path], *, made_since_s: float) -> list[Path]:
    """Unlink those of ``files`` that we own, that are no older than ``made_since_s`` and that no process uses."""
    present = [file for file in files if _is_ours(file, made_since_s)]
    if not present:
        return []
    used = shared_memory_of(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    removed = [file for file in present if file not in used]
    for file in removed:
        file.unlink(missing_ok=True)
    return removed


def _is_ours(file: Path, made_since_s: float) -> bool:
    try:
        status = file.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and status.st_ctime >= made_since_s - 1.0


def _mapped(pid: int) -> list[Path]:
    try:
        lines = (_PROC / str(pid) / "maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    names = (line.split(maxsplit=5)[5] for line in lines if str(SHARED_MEMORY) in line and line.count(" ") >= 5)
    return [Path(name) for name in names if _names_shared_memory(name)]


def _opened(pid: int) -> list[Path]:
    found: list[Path] = []
    with contextlib.suppress(OSError):  # the process ended, or is not ours to look at
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(entry.readlink())
                if _names_shared_memory(name):
                    found.append(Path(name))
    return found


def _names_shared_memory(name: str) -> bool:
    return name.startswith(f"{SHARED_MEMORY}/") and not name.endswith(_DELETED)
