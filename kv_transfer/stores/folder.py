"""A folder of segments that the workers of a machine, or of a cluster, share. Reads and writes files; decides nothing.

A file has its name only when it is whole: it is written as a draft and then renamed. Its name says its size, so a
listing says what the folder holds. A writer claims the room first, under a lock, and removes for it what its
worker's book offers: so the files are never more than the capacity, drafts included, whenever a writer dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from kv_transfer.stores.messages import Fault, ReadOrder, WriteOrder
from kv_transfer.stores.sealing import Sealer
from kv_transfer.stores.store import OrderFailed, RankMemory, SegmentStore
from kv_transfer.stores.watch import StoreView
from kv_transfer.tiers.segment import ABOUT, INDEX_BYTES, About, Index, decode, offset, parse_name, segment_bytes

DRAFT = ".draft"
IN_USE = "in_use"
"""Locked, shared, by every engine that uses the folder of its model."""
_ROOM = "room"
_VECTOR_MAX = 512
# How much later than it was used a file says so: to other workers, that look for what to remove.
_TOUCH_INTERVAL_S = 60.0


class SegmentFolder(SegmentStore):
    """One rank's folder."""

    def __init__(self, folder: Path, capacity_bytes: int, memory: RankMemory, sealer: Sealer | None = None) -> None:
        """``capacity_bytes``: of this rank's files. Raises OSError where the folder cannot be used."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        super().__init__(memory, str(folder), sealer)
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._room = Room(folder)
        self._direct = self._takes_direct()

    def write(self, order: WriteOrder, index: bytes, sealed: memoryview | None = None) -> tuple[str, ...]:
        """Write a draft and give it its name."""
        size = segment_bytes(len(order.slots), self._memory.block_bytes)
        draft = self._folder / (order.segment + DRAFT)
        descriptor, evicted = self._claim(order, size, draft)
        try:
            self._put(descriptor, index, order.slots, sealed)
            # A sweep that ran meanwhile could see the file under neither name, or take the draft for an orphan.
            with self._room.locked():
                draft.rename(self._folder / order.segment)
        except Exception:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return evicted

    def read(self, orders: Sequence[ReadOrder]) -> None:
        """Read into slots, past the page cache where that works."""
        path = self._folder / orders[0].segment
        try:
            descriptor = self._open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise OrderFailed(Fault.GONE) from None
        try:
            count = self._get(descriptor, [order.slot for order in orders], orders[0].position)
            about = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if count != len(orders) * self._memory.block_bytes:
            raise OrderFailed(Fault.CORRUPT, f"{path.name} is cut off")
        if time.time() - about.st_mtime > _TOUCH_INTERVAL_S:
            with contextlib.suppress(OSError):
                os.utime(path)

    def head(self, name: str) -> bytes:
        """The first bytes of a file."""
        return _head(self._folder / name)[0]

    def remove(self, names: Sequence[str]) -> None:
        """Remove files."""
        self._room.remove(names)

    def close(self) -> None:
        """End after what is under way."""
        super().close()
        self._room.close()

    def _put(self, descriptor: int, index: bytes, slots: Sequence[int], sealed: memoryview | None) -> None:
        """Write a segment into a new file."""
        page = mmap.mmap(-1, INDEX_BYTES)
        page[:] = index
        blocks = [self._memory.row(slot) for slot in slots] if sealed is None else [sealed]
        _write_all(descriptor, [memoryview(page), *blocks])

    def _get(self, descriptor: int, slots: Sequence[int], position: int) -> int:
        """Read blocks that lie side by side, from ``position`` on; the bytes that were there."""
        rows = [self._memory.row(slot) for slot in slots]
        return os.preadv(descriptor, rows, offset(position, self._memory.block_bytes))

    def _claim(self, order: WriteOrder, size: int, draft: Path) -> tuple[int, tuple[str, ...]]:
        """Make room for a draft and create it, with a lock that says that it is being written."""
        evicted: list[str] = []
        # Of what is to be freed on all ranks, this one's.
        freed, to_free = 0, order.room.free_bytes // self._memory.ranks
        with self._room.locked() as used:
            if used.bytes + size > self._capacity_bytes:
                used.bytes = sweep(self._folder)
            # All are of little value here. Of these the one goes first that no worker has used for longest.
            for victim in sorted(order.room.victims, key=self._used_s):
                if freed >= to_free and used.bytes + size <= self._capacity_bytes:
                    break
                gone = _removed(self._folder / victim)
                used.bytes, freed = used.bytes - gone, freed + gone
                evicted.append(victim)
            if used.bytes + size > self._capacity_bytes or freed < to_free:
                raise OrderFailed(Fault.FULL)
            descriptor = self._open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            used.bytes += size
        return descriptor, tuple(evicted)

    def _used_s(self, name: str) -> float:
        try:
            return (self._folder / name).stat().st_mtime
        except OSError:
            return 0.0

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0), 0o600)

    def _takes_direct(self) -> bool:
        """Whether this file system reads and writes past the page cache, tried on one page and one row."""
        probe, row = self._folder / f"probe-{os.getpid()}{DRAFT}", self._memory.row(0)
        try:
            with mmap.mmap(-1, INDEX_BYTES) as page:
                descriptor = os.open(probe, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT, 0o600)
                try:
                    page[:] = b"\x5a" * INDEX_BYTES
                    written = os.pwritev(descriptor, [page, row], 0)
                    page[:] = bytes(INDEX_BYTES)
                    os.preadv(descriptor, [page], 0)
                    return written == INDEX_BYTES + len(row) and page[:] == b"\x5a" * INDEX_BYTES
                finally:
                    os.close(descriptor)
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)


class _Used:
    def __init__(self, size_bytes: int) -> None:
        self.bytes = size_bytes


class Room:
    """The bytes of all files in a folder, kept in a file of its own. Never less than there are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = os.open(folder / _ROOM, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        # A file lock is one of the process.
        self._threads = threading.Lock()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def remove(self, names: Sequence[str]) -> None:
        """Remove segments, if they are there."""
        with self.locked() as used:
            for name in names:
                used.bytes -= _removed(self._folder / name)

    def recount(self) -> None:
        """Sweep, and count what is left."""
        with self.locked() as used:
            used.bytes = sweep(self._folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[_Used]:
        """The bytes, which no other process changes meanwhile. What is set is kept, also when an error is raised."""
        with self._threads:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                text = os.pread(self._file, 32, 0)
                used = _Used(int(text) if text.strip().isdigit() else sweep(self._folder))
                try:
                    yield used
                finally:
                    os.pwrite(self._file, b"%031d\n" % max(0, used.bytes), 0)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def sweep(folder: Path) -> int:
    """Remove what is no segment, and drafts whose writer is dead; the bytes of what is left. Under the room's lock."""
    used = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.removesuffix(DRAFT)
            about = parse_name(name)
            if entry.name == _ROOM:
                continue
            if about is None or (entry.name != name and _is_orphan(entry.path)):
                Path(entry.path).unlink(missing_ok=True)
            else:
                used += about.size_bytes
    return used


def remove_segments(folder: Path, names: Sequence[str]) -> None:
    """Remove segments from outside."""
    with contextlib.closing(Room(folder)) as room:
        room.remove(names)


def recount(folder: Path) -> None:
    """Remove drafts of dead writers and what is no segment."""
    with contextlib.closing(Room(folder)) as room:
        room.recount()


def segments_in(folder: Path) -> set[str]:
    """The names of the segments."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if parse_name(entry.name) is not None}
    except FileNotFoundError:
        return set()


def read_index(path: Path, sealer: Sealer | None = None) -> Index:
    """The index of a segment. Raises BadSegment, and OSError."""
    page, size_bytes = _head(path)
    return decode(page if sealer is None else sealer.open(where(path), page).page, size_bytes=size_bytes)


def where(path: Path) -> str:
    """Fingerprint, rank and name of a segment."""
    return "/".join(path.parts[-3:])


def _head(path: Path) -> tuple[bytes, int]:
    """The first bytes of a segment, and how many there are."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, INDEX_BYTES, 0), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


class FolderView(StoreView):
    """What the folders of all ranks hold."""

    def __init__(self, folders: Sequence[Path], sealer: Sealer | None = None) -> None:
        self._folders = folders
        self._sealer = sealer

    def names(self) -> set[str]:
        """Segments of which every rank's part is there."""
        return set.intersection(*(segments_in(folder) for folder in self._folders))

    def indexes(self, name: str) -> Sequence[Index]:
        """A segment's index, by rank. Raises BadSegment and OSError."""
        return [read_index(folder / name, self._sealer) for folder in self._folders]


def describe(folder: Path, about: About) -> None:
    """Leave a file that says of which model the segments are."""
    draft = folder / f"{ABOUT}-{os.getpid()}{DRAFT}"
    draft.write_bytes(msgspec.json.encode(about))
    draft.rename(folder / ABOUT)


def in_use(folder: Path) -> int:
    """Say that an engine uses the folder of its model, until the descriptor is closed."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(folder / IN_USE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def fingerprints_in(place: Path) -> set[str]:
    """The models that have a folder here, each with its own settings."""
    return {path.parent.name for path in place.glob(f"*/{IN_USE}")}


def remove_unused(place: Path) -> list[str]:
    """Remove the folders of models that no engine uses; their names."""
    removed = []
    for folder in sorted(place.iterdir()) if place.is_dir() else ():
        try:
            if not (folder / IN_USE).is_file():
                continue
            lock = os.open(folder / IN_USE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            # Another user's, or another engine removes it now.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
    return removed


def _is_orphan(path: str) -> bool:
    """Whether the writer of this draft is dead."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _removed(path: Path) -> int:
    """Remove a segment; the bytes that it had."""
    about = parse_name(path.name)
    assert about is not None, path
    try:
        path.unlink()
    except FileNotFoundError:
        return 0
    return about.size_bytes


def _write_all(descriptor: int, parts: list[memoryview]) -> None:
    """All of these, from the file's beginning on."""
    at = 0
    for first in range(0, len(parts), _VECTOR_MAX):
        some = parts[first : first + _VECTOR_MAX]
        wanted = sum(map(len, some))
        written = os.pwritev(descriptor, some, at)
        if written != wanted:
            raise OSError(f"{written} of {wanted} bytes were written")
        at += written
