"""Which key is served next: start-time fair queueing with weights. Knows no request and no clock.

Each key has a virtual time, which advances by what it was charged over its weight; the key furthest behind is next.
A key that was away is not owed anything: it comes back at its own virtual time, but not below the floor. The floor is
the virtual time of the key that was served last, or of the key that is next if a correction made that one smaller.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator


class FairQueue:
    """Keys enter when something of theirs waits and leave when nothing does."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._virtual = 0.0
        self._starts: dict[str, float] = {}
        self._present: dict[str, float] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._present)

    def __iter__(self) -> Iterator[str]:
        return iter(self._present)

    @property
    def weights(self) -> float:
        """Sum over the keys that wait."""
        return sum(self._present.values())

    def enter(self, key: str, weight: float = 1.0) -> None:
        """Something of ``key`` waits now. Idempotent."""
        if key not in self._present:
            start = max(self._floor(), self._starts.get(key, 0.0))
            self._present[key] = weight
            self._push(key, start)

    def leave(self, key: str) -> None:
        """Nothing of ``key`` waits any more. Idempotent."""
        if self._present.pop(key, None) is None:
            return
        if self._starts[key] <= self._floor():
            del self._starts[key]
        self._bound()

    def next_key(self) -> str | None:
        """The next key; None when none waits."""
        while self._heap:
            start, _, key = self._heap[0]
            if key in self._present and self._starts.get(key) == start:
                return key
            heapq.heappop(self._heap)
        return None

    def charge(self, key: str, cost: float, weight: float = 1.0) -> None:
        """``key`` is served, whether it waited or not."""
        start = self._starts[key] if key in self._present else max(self._floor(), self._starts.get(key, 0.0))
        self._virtual = max(self._virtual, start)
        if key in self._present:
            self._push(key, start + cost / weight)
            return
        self._starts[key] = start + cost / weight
        self._bound()

    def correct(self, key: str, cost: float, weight: float = 1.0) -> None:
        """``key`` was charged ``cost`` too little, or too much where it is negative.

        A key that waits gets back all of it: its virtual time may become the smallest, and it is then served next. One
        that does not wait gets no credit.
        """
        if key in self._present:
            self._push(key, self._starts[key] + cost / weight)
            return
        floor = self._floor()
        start = max(floor, self._starts.get(key, 0.0)) + cost / weight
        if start > floor:
            self._starts[key] = start
        else:
            self._starts.pop(key, None)
        self._bound()

    def _floor(self) -> float:
        """Where a key begins that was not here."""
        first = self.next_key()
        return self._virtual if first is None else min(self._virtual, self._starts[first])

    def _push(self, key: str, start: float) -> None:
        self._starts[key] = start
        heapq.heappush(self._heap, (start, next(self._count), key))
        if len(self._heap) > 2 * len(self._present) + 64:
            self._heap = [entry for entry in self._heap if self._starts.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def _bound(self) -> None:
        """Forget the absent when there are too many: first those that owe nothing, then the longest ago."""
        if len(self._starts) <= self._keys_max + len(self._present):
            return
        absent = [key for key in self._starts if key not in self._present]
        kept = [key for key in absent if self._starts[key] > self._virtual][-self._keys_max // 2 :]
        for key in set(absent).difference(kept):
            del self._starts[key]
