"""A histogram that sorts what it saw when it is looked at. Shows what prometheus-client's own shows.

A request has fifteen of them. To sort each value at once, in cold caches, took 3 % of a front proxy's CPU.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
from collections.abc import Iterable
from typing import Any

from prometheus_client import Histogram

UNSORTED_MAX = 1024
"""Values that wait; one more has all of them sorted."""


class LateHistogram(Histogram):
    """The same, but for exemplars. To be used by one thread, and looked at by any."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._unsorted: collections.deque[float] = collections.deque()

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Count one value."""
        del exemplar
        self._unsorted.append(amount)
        if len(self._unsorted) > UNSORTED_MAX:
            self._sort()

    def _sort(self) -> None:
        counts: collections.Counter[int] = collections.Counter()
        total = 0.0
        with contextlib.suppress(IndexError):  # a thread that looks may have taken the last one
            for _ in range(len(self._unsorted)):
                amount = self._unsorted.popleft()
                counts[bisect.bisect_left(self._upper_bounds, amount)] += 1
                total += amount
        self._sum.inc(total)
        for index, count in counts.items():
            self._buckets[index].inc(count)

    def _child_samples(self) -> Iterable[Any]:
        self._sort()
        return super()._child_samples()
