"""Blocks in files: which are there, which are being written or read, which leave. Opens no file.

A block is written when a second request has it: most prompts come once. A file that did not hold its block is removed,
and so is the one that leaves for others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from kv_transfer.tiers.catalog import Catalog
from kv_transfer.tiers.status import TierStatus

_TOUCHES_MIN = 2
# Blocks that were seen once, and blocks under way: bounds of memory, and of what a disk that hangs can hold up.
_SEEN_MAX = 65_536
_UNDER_WAY_MAX = 512


class FileBlocks:
    """One worker's files, each of ``file_bytes``."""

    def __init__(self, capacity_bytes: int, file_bytes: int, block_tokens: int) -> None:
        self._catalog = Catalog(capacity_bytes)
        self._file_bytes = file_bytes
        self._block_tokens = block_tokens
        self._writing: set[bytes] = set()
        self._reading: dict[bytes, int] = {}
        # Of blocks that are not here: requests that had them.
        self._seen: dict[bytes, int] = {}
        self._counts = dict.fromkeys(("hits", "stored", "evicted", "corrupt", "declined"), 0)

    def found(self, keys: Iterable[bytes]) -> list[bytes]:
        """Blocks that lie in the folder from earlier, the oldest first. Returned are those whose files are to go."""
        evicted: list[bytes] = []
        for key in keys:
            evicted += self._catalog.make_room(self._file_bytes)
            if self._catalog.used_bytes + self._file_bytes > self._catalog.capacity_bytes:
                evicted.append(key)
                continue
            self._catalog.add(key, size_bytes=self._file_bytes, saved_tokens=self._block_tokens, depth=0)
            self._catalog.use([key], new=[key])
        return evicted

    def has(self, key: bytes) -> bool:
        """Whether the block can be read now."""
        return key in self._catalog and key not in self._writing and len(self._reading) < _UNDER_WAY_MAX

    def run(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys`` are here from the first on, without a gap."""
        for count, key in enumerate(keys):
            if key not in self._catalog or key in self._writing:
                return count
        return len(keys)

    def read(self, key: bytes) -> None:
        """A read begins."""
        self._reading[key] = self._reading.get(key, 0) + 1
        self._catalog.pin(key)

    def read_ended(self, key: bytes, *, sound: bool, corrupt: bool = False) -> bool:
        """A read has ended. True: its file is to be removed."""
        self._catalog.unpin(key)
        self._reading[key] -= 1
        if not self._reading[key]:
            del self._reading[key]
        if sound:
            self._counts["hits"] += 1
            return False
        self._counts["corrupt"] += corrupt
        if key in self._reading:
            return False
        self._catalog.remove(key)
        return True

    def used(self, keys: Collection[bytes]) -> list[bytes]:
        """A request with these ends. Those that are worth writing now, in order."""
        worth = []
        for key in keys:
            if key in self._catalog:
                continue
            touches = self._seen.pop(key, 0) + 1
            self._seen[key] = touches
            if touches >= _TOUCHES_MIN:
                worth.append(key)
        while len(self._seen) > _SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        self._catalog.use(keys)
        return worth

    def write(self, keys: Sequence[bytes], depth_of: dict[bytes, int]) -> tuple[list[bytes], list[bytes]]:
        """Which of ``keys`` to write now, and whose files are to be removed before."""
        wanted = [key for key in keys if key not in self._catalog][: _UNDER_WAY_MAX - len(self._writing)]
        evicted = self._catalog.make_room(len(wanted) * self._file_bytes)
        self._counts["evicted"] += len(evicted)
        room = (self._catalog.capacity_bytes - self._catalog.used_bytes) // self._file_bytes
        accepted = wanted[:room]
        for key in accepted:
            self._catalog.add(
                key, size_bytes=self._file_bytes, saved_tokens=self._block_tokens, depth=depth_of.get(key, 0)
            )
            self._catalog.pin(key)
            self._writing.add(key)
            self._seen.pop(key, None)
        return accepted, evicted

    def write_ended(self, key: bytes, *, written: bool) -> None:
        """A write has ended."""
        self._writing.discard(key)
        self._catalog.unpin(key)
        if written:
            self._counts["stored"] += 1
        else:
            self._catalog.remove(key)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._catalog)

    def forget(self, key: bytes) -> bool:
        """The block is not to be read any more. True: its file is to be removed now, since nothing is under way."""
        if key not in self._catalog or key in self._reading or key in self._writing:
            return False
        self._catalog.remove(key)
        return True

    def declined(self, blocks: int) -> None:
        """So many blocks were here, and computing them takes less time than loading them."""
        self._counts["declined"] += blocks

    def status(self) -> TierStatus:
        """What is here, and what was counted."""
        return TierStatus(
            name="file",
            blocks=len(self._catalog),
            bytes=self._catalog.used_bytes,
            capacity_bytes=self._catalog.capacity_bytes,
            **self._counts,
        )
