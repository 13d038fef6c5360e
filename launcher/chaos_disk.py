"""A full disk for every process of a cluster: a limit on the size of files, set from outside, refuses each write.

RLIMIT_FSIZE of 0 lets nobody write a byte to a regular file, wherever it lies: logs, state file, also files in shared
memory that are made meanwhile. Sockets, pipes and memory that is mapped already go on. Writes fail with EFBIG instead
of ENOSPC, in the same places, and no file system has to be filled or mounted. New processes inherit it. Linux only.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def full(launcher_pid: int) -> Iterator[None]:
    """No process below `baton up`, nor itself, can write to a file while the block runs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        _limit(launcher_pid, 0)
        yield
    finally:
        # Also those that were started meanwhile.
        _limit(launcher_pid, soft)


def _limit(launcher_pid: int, soft: int) -> None:
    # Twice, the launcher first: what is started between looking and limiting is found the second time.
    for _ in range(2):
        for pid in _tree(launcher_pid):
            with contextlib.suppress(ProcessLookupError):
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _tree(pid: int) -> list[int]:
    try:
        root = psutil.Process(pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
