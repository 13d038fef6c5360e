"""A folder of KV blocks, one file each: reads and writes them in threads of its own. Decides nothing.

A file has its name only when it is whole: it is written under another name and then renamed. So a process that dies at
any moment leaves at most such a draft, and the next one removes it. What a file holds is checked whenever it is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import structlog

from kv_transfer.tiers import block_file
from kv_transfer.tiers.block_file import HEADER_BYTES, Fault, Label

log = structlog.get_logger(__name__)

_DRAFT = ".draft"
_LOCK = "lock"
_READERS = 2
_TOLD_MAX = 100
_SUBFOLDER_DIGITS = 2


class FileJob(msgspec.Struct, frozen=True):
    """A block, the slot of host memory that it is read into or written from, and its checksum in the engine."""

    key: bytes
    slot: int
    checksum: bytes = b""


class FileResult(msgspec.Struct, frozen=True):
    """What became of a job. ``checksum``: of a block that was read and is sound. ``fault``: why it is not."""

    key: bytes
    slot: int
    is_read: bool
    checksum: bytes = b""
    fault: str = ""
    corrupt: bool = False


class BlockFolder:
    """One rank's folder, used by one process at a time."""

    def __init__(
        self,
        folder: Path,
        label: Callable[[bytes], Label],
        row: Callable[[int], memoryview],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """``row``: the memory of a slot, until ``close`` is called.

        Raises OSError, and BlockingIOError where another process uses the folder.
        """
        self._folder = folder
        self._label = label
        self._row = row
        self._close = close
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _locked(folder)
        # One thread, so that a file is not removed after it was written anew.
        self._writer = ThreadPoolExecutor(1, "kv-file-writer")
        self._readers = ThreadPoolExecutor(_READERS, "kv-file-reader")
        # Faults that were logged: a disk that fails would fill the log.
        self._told: set[str] = set()
        self._results: queue.SimpleQueue[FileResult] = queue.SimpleQueue()
        self._direct = self._takes_direct()

    def write(self, jobs: Sequence[FileJob], gone: Sequence[bytes]) -> None:
        """Remove the files of ``gone``, then write these blocks."""
        self._writer.submit(self._remove, gone)
        for job in jobs:
            self._writer.submit(self._run, self._write, job, is_read=False)

    def read(self, jobs: Sequence[FileJob]) -> None:
        """Read these blocks."""
        for job in jobs:
            self._readers.submit(self._run, self._read, job, is_read=True)

    def finished(self) -> Iterator[FileResult]:
        """What has ended since the last call."""
        while True:
            try:
                yield self._results.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """End after what is under way."""
        self._writer.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        os.close(self._lock)
        self._close()

    def _run(self, what: Callable[[FileJob], FileResult], job: FileJob, *, is_read: bool) -> None:
        try:
            result = what(job)
        except Exception as error:  # noqa: BLE001 - whatever a disk does, the engine goes on without it
            result = FileResult(job.key, job.slot, is_read, fault=f"{type(error).__name__}: {error}")
        if result.fault and result.fault not in self._told and len(self._told) < _TOLD_MAX:
            self._told.add(result.fault)
            log.warning(
                "KV blocks in files cannot be used; counted from now on", folder=str(self._folder), why=result.fault
            )
        self._results.put(result)

    def _path(self, key: bytes) -> Path:
        name = block_file.name(key)
        return self._folder / name[:_SUBFOLDER_DIGITS] / name

    def _write(self, job: FileJob) -> FileResult:
        row, path = self._row(job.slot), self._path(job.key)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        draft = path.with_name(path.name + _DRAFT)
        with mmap.mmap(-1, HEADER_BYTES) as page:
            page[:] = block_file.header(self._label(job.key), row, job.checksum)
            descriptor = self._open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            try:
                written = os.writev(descriptor, [page, row])
                if written != HEADER_BYTES + len(row):
                    raise OSError(f"{written} of {HEADER_BYTES + len(row)} bytes were written")
            except OSError:
                draft.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        draft.rename(path)
        return FileResult(job.key, job.slot, is_read=False)

    def _read(self, job: FileJob) -> FileResult:
        row = self._row(job.slot)
        with mmap.mmap(-1, HEADER_BYTES) as page:
            descriptor = self._open(self._path(job.key), os.O_RDONLY)
            try:
                count = os.readv(descriptor, [page, row])
                longer = os.fstat(descriptor).st_size != HEADER_BYTES + len(row)
            finally:
                os.close(descriptor)
            short = count != HEADER_BYTES + len(row) or longer
            found = Fault.TRUNCATED if short else block_file.check(self._label(job.key), bytes(page), row)
        if isinstance(found, Fault):
            return FileResult(job.key, job.slot, is_read=True, fault=found.value, corrupt=True)
        return FileResult(job.key, job.slot, is_read=True, checksum=found)

    def _remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            try:
                self._path(key).unlink(missing_ok=True)
            except OSError as error:
                log.warning("a KV file cannot be removed", folder=str(self._folder), why=str(error))

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0), 0o600)

    def _takes_direct(self) -> bool:
        """Whether this file system reads and writes past the page cache, tried on one page and one row."""
        probe, row = self._folder / f"probe{_DRAFT}", self._row(0)
        try:
            with mmap.mmap(-1, HEADER_BYTES) as page:
                descriptor = os.open(probe, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT, 0o600)
                try:
                    page[:] = b"\x5a" * HEADER_BYTES
                    written = os.pwritev(descriptor, [page, row], 0)
                    page[:] = bytes(HEADER_BYTES)
                    os.preadv(descriptor, [page], 0)
                    return written == HEADER_BYTES + len(row) and page[:] == b"\x5a" * HEADER_BYTES
                finally:
                    os.close(descriptor)
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)


def _locked(folder: Path) -> int:
    """The lock of a folder, which a process that dies gives back."""
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def remove_unused(folder: Path, *, keep: str) -> None:
    """Remove the subfolders of models that this worker served before, unless an engine uses them."""
    for other in folder.iterdir():
        if other.name == keep or not all(each.is_dir() for each in (other, *other.glob("*"))):
            continue
        with contextlib.ExitStack() as locks, contextlib.suppress(OSError):
            for part in other.iterdir():
                locks.callback(os.close, _locked(part))
            shutil.rmtree(other)


def scan(folder: Path, file_bytes: int) -> list[bytes]:
    """The keys of the blocks that lie in the folder, the oldest first. Removes drafts, and what is of another size."""
    found: list[tuple[int, bytes]] = []
    for subfolder in folder.iterdir() if folder.is_dir() else ():
        if not subfolder.is_dir():
            continue
        with os.scandir(subfolder) as entries:
            for entry in entries:
                key, about = block_file.key_of(entry.name), entry.stat(follow_symlinks=False)
                if key is None or about.st_size != file_bytes:
                    Path(entry.path).unlink(missing_ok=True)
                else:
                    found.append((about.st_mtime_ns, key))
    return [key for _, key in sorted(found)]
