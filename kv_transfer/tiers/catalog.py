"""Which blocks a tier holds, and which leave first when it is full. Moves no byte and knows no time.

A block's value is ``clock + uses * saved_tokens / size_bytes`` (greedy dual size frequency). The clock is the value of
the last block that left, so what was not used for long falls behind what is new. Of equal values the one whose last
request came first leaves first, and of one request's blocks the deepest: without those before it, a block is of no use.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator

_SLACK = 64


class _Entry:
    __slots__ = ("depth", "pins", "rank", "saved_tokens", "size_bytes", "uses")

    def __init__(self, size_bytes: int, saved_tokens: int, depth: int) -> None:
        self.size_bytes = size_bytes
        self.saved_tokens = saved_tokens
        self.depth = depth
        self.uses = 0
        # What leaves first has the lowest: value, request, depth.
        self.rank = (0.0, 0, -depth)
        self.pins = 0


class Catalog:
    """Blocks by key, at most ``capacity_bytes`` together."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._entries: dict[bytes, _Entry] = {}
        # One item for each entry, with a rank that it had: ranks only rise, so an item is too low at most.
        self._heap: list[tuple[tuple[float, int, int], bytes]] = []
        self._clock = 0.0
        self._requests = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def add(self, key: bytes, *, size_bytes: int, saved_tokens: int, depth: int) -> None:
        """A block comes in. The caller has made room for it. ``depth``: tokens up to its end."""
        assert key not in self._entries
        assert self.used_bytes + size_bytes <= self.capacity_bytes, "no room was made"
        entry = _Entry(size_bytes, saved_tokens, depth)
        self._entries[key] = entry
        self.used_bytes += size_bytes
        self._use(entry, 1)
        self._push(key, entry)

    def use(self, keys: Iterable[bytes], new: Collection[bytes] = ()) -> None:
        """A request with these blocks ends, ``new`` of which came in with it. Those that are not here are left out."""
        self._requests += 1
        for key in keys:
            if (entry := self._entries.get(key)) is not None:
                self._use(entry, key not in new)

    def _use(self, entry: _Entry, uses: int) -> None:
        entry.uses += uses
        value = self._clock + entry.uses * entry.saved_tokens / entry.size_bytes
        entry.rank = (value, self._requests, -entry.depth)

    def pin(self, key: bytes) -> None:
        """Keep the block until ``unpin``, which is called as often."""
        self._entries[key].pins += 1

    def unpin(self, key: bytes) -> None:
        """Undo one ``pin``."""
        entry = self._entries[key]
        assert entry.pins > 0
        entry.pins -= 1

    def remove(self, key: bytes) -> None:
        """The block is gone."""
        self.used_bytes -= self._entries.pop(key).size_bytes
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = [(entry.rank, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)

    def make_room(self, size_bytes: int, keep: Callable[[bytes], bool] = lambda _: False) -> list[bytes]:
        """Let the least valuable blocks go until ``size_bytes`` fit, or no more may go; their keys.

        Pinned blocks stay, and those that ``keep`` names.
        """
        gone: list[bytes] = []
        kept: set[bytes] = set()
        while self.used_bytes + size_bytes > self.capacity_bytes and self._heap:
            rank, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is None or key in kept:
                continue  # an item of an earlier life of this block
            if entry.rank > rank:
                self._push(key, entry)
            elif entry.pins or keep(key):
                kept.add(key)
            else:
                self._clock = max(self._clock, entry.rank[0])
                self.remove(key)
                gone.append(key)
        for key in kept:
            self._push(key, self._entries[key])
        return gone

    def _push(self, key: bytes, entry: _Entry) -> None:
        heapq.heappush(self._heap, (entry.rank, key))
