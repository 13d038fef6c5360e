"""Which blocks lie in a store, a folder or a bucket of segments that several workers share. Opens nothing.

One worker's view: what it wrote, and what its watch saw of the others. A block is written when a second request has it:
most prompts come once. A segment leaves as a whole, and so it does when one of its blocks is not what was stored.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from kv_transfer.tiers.catalog import Catalog
from kv_transfer.tiers.segment import CHECKSUM_BYTES
from kv_transfer.tiers.status import TierStatus

_TOUCHES_MIN = 2
# Blocks that were seen once: a bound of memory.
_SEEN_MAX = 65_536
_VICTIMS_MAX = 16
_COUNTED = ("hits", "misses", "stored", "evicted", "corrupt", "declined", "ahead", "ahead_unused")


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A segment that can be read. ``sums``: by rank, the checksums of its blocks one after the other."""

    name: str
    scope: str
    size_bytes: int
    keys: tuple[bytes, ...]
    sums: tuple[bytes, ...]
    depth_tokens: int = 0


class Part(msgspec.Struct, frozen=True, gc=False):
    """Where a block lies, and its checksum by rank."""

    segment: str
    position: int
    sums: dict[int, bytes]


class Room(msgspec.Struct, frozen=True):
    """What may go for a new segment, the least valuable first."""

    victims: list[str]
    free_bytes: int = 0
    """How much of it must go, whatever room there is."""
    used_bytes: int = 0
    """What lies there, as far as this worker knows."""


class StoreBlocks:
    """Blocks by key."""

    def __init__(self, kind: str, capacity_bytes: int, block_tokens: int, *, scope_share: float = 1.0) -> None:
        """``scope_share``: of the capacity, what one scope may take."""
        self.kind = kind
        self.capacity_bytes = capacity_bytes
        self.block_tokens = block_tokens
        self._scope_bytes_max = int(capacity_bytes * scope_share)
        self._catalog: Catalog[str] = Catalog(capacity_bytes)
        self._segments: dict[str, Segment] = {}
        self._where: dict[bytes, Segment] = {}
        self._scope_bytes: Counter[str] = Counter()
        # Segments that are being read here.
        self._read: Counter[str] = Counter()
        # Of blocks that are not here: requests that had them.
        self._seen: dict[bytes, int] = {}
        self._counts: dict[str, Any] = dict.fromkeys(_COUNTED, 0)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        """The segments."""
        return iter(self._segments)

    def appeared(self, segment: Segment) -> list[bytes]:
        """A segment can be read now; its blocks that were not here before. Told twice it changes nothing."""
        if segment.name in self._segments:
            return []
        self._segments[segment.name] = segment
        self._scope_bytes[segment.scope] += segment.size_bytes
        self._catalog.add(
            segment.name,
            size_bytes=segment.size_bytes,
            saved_tokens=self.block_tokens,
            depth=segment.depth_tokens,
        )
        self._catalog.use([segment.name], new=[segment.name])
        new = [key for key in segment.keys if key not in self._where]
        for key in segment.keys:
            # Of two segments that have a block the older one is likely to leave first.
            self._where[key] = segment
            self._seen.pop(key, None)
        return new

    def vanished(self, name: str, *, evicted: bool = False) -> list[bytes]:
        """A segment is gone; its blocks that are not here any more. ``evicted``: this worker made room with it."""
        segment = self._segments.pop(name, None)
        if segment is None:
            return []
        self._scope_bytes[segment.scope] -= segment.size_bytes
        if not self._scope_bytes[segment.scope]:
            del self._scope_bytes[segment.scope]
        self._catalog.evict(name)
        gone = [key for key in segment.keys if self._where.get(key) is segment]
        for key in gone:
            del self._where[key]
        self._counts["evicted"] += len(segment.keys) * evicted
        return gone

    def run(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys`` are here from the first on, without a gap."""
        for count, key in enumerate(keys):
            if key not in self._where:
                return count
        return len(keys)

    def read(self, key: bytes) -> Part:
        """A read of a block that is here begins."""
        segment = self._where[key]
        self._read[segment.name] += 1
        place = segment.keys.index(key)
        start = place * CHECKSUM_BYTES
        sums = {rank: each[start : start + CHECKSUM_BYTES] for rank, each in enumerate(segment.sums)}
        return Part(segment.name, place, sums)

    def read_ended(self, segment: str, *, sound: bool) -> None:
        """A read of one block of a segment has ended."""
        self._read[segment] -= 1
        if not self._read[segment]:
            del self._read[segment]
        self._counts["hits"] += sound

    def condemn(self, keys: Iterable[bytes]) -> list[str]:
        """These are not what was stored. The segments that they lie in, which are to be removed."""
        names = dict.fromkeys(segment.name for key in keys if (segment := self._where.get(key)) is not None)
        return list(names)

    def corrupt(self, blocks: int) -> None:
        """So many blocks were not what was stored."""
        self._counts["corrupt"] += blocks

    def used(self, keys: Collection[bytes]) -> list[bytes]:
        """A request with these ends. Those that are worth writing now, in order."""
        worth, there = [], []
        for key in keys:
            if (segment := self._where.get(key)) is not None:
                there.append(segment.name)
                continue
            touches = self._seen.pop(key, 0) + 1
            self._seen[key] = touches
            if touches >= _TOUCHES_MIN:
                worth.append(key)
        while len(self._seen) > _SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        self._catalog.use(there)
        return worth

    def room(self, size_bytes: int, scope: str) -> Room:
        """What may make room for a segment. A scope that has its share makes room for itself."""
        excess = self._scope_bytes[scope] + size_bytes - self._scope_bytes_max
        own = excess > 0
        victims = self._catalog.cheapest(_VICTIMS_MAX, functools.partial(self._may_go, scope if own else None))
        return Room(victims, max(0, excess), self._catalog.used_bytes)

    def written(self, blocks: int) -> None:
        """So many blocks were written."""
        self._counts["stored"] += blocks

    def declined(self, blocks: int) -> None:
        """So many blocks were here, and computing them takes less time than loading them."""
        self._counts["declined"] += blocks

    def read_ahead(self, blocks: int) -> None:
        """So many blocks are read for a request that waits its turn."""
        self._counts["ahead"] += blocks

    def read_in_vain(self, blocks: int) -> None:
        """Of these, so many were not loaded by it."""
        self._counts["ahead_unused"] += blocks

    def status(self) -> TierStatus:
        """What is here, and what was counted."""
        return TierStatus(
            name=self.kind,
            blocks=len(self._where),
            bytes=self._catalog.used_bytes,
            capacity_bytes=self.capacity_bytes,
            **self._counts,
        )

    def _may_go(self, scope: str | None, name: str) -> bool:
        return name not in self._read and (scope is None or self._segments[name].scope == scope)
