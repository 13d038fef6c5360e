"""Leadership by a lock on a local file, which the kernel frees when its holder dies. Knows no time and renews nothing.

The file keeps the last epoch. A leader that stands still keeps its lock: ``baton up`` kills a scheduler that does not
answer (``launcher.hosted.supervision``). The lock is polled and not waited for in a thread: four calls a second cost
nothing, and a thread that waits in ``flock`` cannot be cancelled.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from pathlib import Path

import structlog

from scheduler.leadership.rules import next_epoch

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 0.25
"""How often a stand-by tries the lock, and how often a leader looks whether its file is still there."""
# The epoch in decimal is padded to this, so that one write replaces all of the one before.
_RECORD_BYTES = 64


class FileLock:
    """A lock on ``path``, in a folder on a local disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        # The largest that this process saw, also in a file that was deleted since.
        self._epoch = 0

    @property
    def until_s(self) -> float:
        """Never while the lock is held."""
        return float("-inf") if self._file is None else float("inf")

    async def acquire(self) -> int:
        """Wait until this process holds the lock and has written its epoch."""
        told = ""
        while True:
            try:
                if self._try():
                    return self._epoch
                told = ""
            except OSError as error:
                if str(error) != told:
                    log.warning("the leader's file cannot be used", why=str(error))
                told = str(error)
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def lost(self) -> str:
        """Wait until the file is deleted or replaced: then another process can lock the new one."""
        assert self._file is not None, "it does not lead"
        while _is_at(self._file, self._path):  # noqa: ASYNC110 - no event tells that a file was deleted
            await asyncio.sleep(LOOK_INTERVAL_S)
        return "the leader's file was deleted"

    async def release(self) -> None:
        """Unlock."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _try(self) -> bool:
        assert self._file is None, "it leads already"
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            locked = _lock(file)
            self._epoch = max(self._epoch, _read(file))
            # The file may have been deleted after it was opened: that lock is worth nothing.
            if locked and _is_at(file, self._path):
                self._epoch = next_epoch(self._epoch, time.time_ns() // 1_000_000)
                _write(file, self._path, self._epoch)
                self._file = file
        finally:
            if self._file is None:
                os.close(file)
        return self._file is not None


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _read(file: int) -> int:
    """0 where the file is new or was torn by a crash; then the clock alone makes the next epoch larger."""
    written = os.pread(file, _RECORD_BYTES, 0).strip()
    return int(written) if written.isdigit() else 0


def _write(file: int, path: Path, epoch: int) -> None:
    """Durably, the file's name included."""
    os.pwrite(file, b"%d" % epoch + b"\n" * (_RECORD_BYTES - len(str(epoch))), 0)
    os.fsync(file)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
