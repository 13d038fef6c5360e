"""What a tier holds, blocks or segments of many, and what leaves first when it is full. Moves no byte, knows no time.

A block's value is ``clock + uses * saved_tokens / size_bytes`` (greedy dual size frequency). The clock is the value of
the last block that left, so what was not used for long falls behind what is new. Of equal values the one whose last
request came first leaves first, and of one request's blocks the deepest: without those before it, a block is of no use.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

_SLACK = 64
_PASSED_MAX = 4096
Key = TypeVar("Key", bound=Hashable)


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


class Catalog(Generic[Key]):
    """Blocks by key, to be at most ``capacity_bytes`` together."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._entries: dict[Key, _Entry] = {}
        # One item for each entry, with a rank that it had: ranks only rise, so an item is too low at most.
        self._heap: list[tuple[tuple[float, int, int], Key]] = []
        self._clock = 0.0
        self._requests = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def add(self, key: Key, *, size_bytes: int, saved_tokens: int, depth: int) -> None:
        """A block comes in. ``depth``: tokens up to its end."""
        assert key not in self._entries
        entry = _Entry(size_bytes, saved_tokens, depth)
        self._entries[key] = entry
        self.used_bytes += size_bytes
        self._use(entry, 1)
        self._push(key, entry)

    def use(self, keys: Iterable[Key], new: Collection[Key] = ()) -> None:
        """A request with these blocks ends, ``new`` of which came in with it. Those that are not here are left out."""
        self._requests += 1
        for key in keys:
            if (entry := self._entries.get(key)) is not None:
                self._use(entry, key not in new)

    def _use(self, entry: _Entry, uses: int) -> None:
        entry.uses += uses
        value = self._clock + entry.uses * entry.saved_tokens / entry.size_bytes
        entry.rank = (value, self._requests, -entry.depth)

    def pin(self, key: Key) -> None:
        """Keep the block until ``unpin``, which is called as often."""
        self._entries[key].pins += 1

    def unpin(self, key: Key) -> None:
        """Undo one ``pin``."""
        entry = self._entries[key]
        assert entry.pins > 0
        entry.pins -= 1

    def remove(self, key: Key) -> None:
        """The block is gone."""
        self.used_bytes -= self._entries.pop(key).size_bytes
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = [(entry.rank, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)

    def evict(self, key: Key) -> None:
        """The block is gone for others."""
        self._clock = max(self._clock, self._entries[key].rank[0])
        self.remove(key)

    def cheapest(self, count: int, may_go: Callable[[Key], bool]) -> list[Key]:
        """At most ``count`` of those that may go, the least valuable first. They stay."""
        found: dict[Key, None] = {}
        passed: list[Key] = []
        while self._heap and len(found) < count and len(passed) < _PASSED_MAX:
            rank, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is None or key in found:
                continue  # an item of an earlier life of this block
            if entry.rank > rank:
                self._push(key, entry)
            elif may_go(key):
                found[key] = None
            else:
                passed.append(key)
        for key in [*found, *passed]:
            self._push(key, self._entries[key])
        return list(found)

    def make_room(self, size_bytes: int, keep: Callable[[Key], bool] = lambda _: False) -> list[Key]:
        """Let the least valuable blocks go until ``size_bytes`` fit, or no more may go; their keys.

        Pinned blocks stay, and those that ``keep`` names.
        """
        gone: list[Key] = []
        kept: set[Key] = set()
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
                self.evict(key)
                gone.append(key)
        for key in kept:
            self._push(key, self._entries[key])
        return gone

    def _push(self, key: Key, entry: _Entry) -> None:
        heapq.heappush(self._heap, (entry.rank, key))
