"""A histogram for the thread of an event loop: a tenth of the cost of prometheus_client's, which locks and scans.

Shown like any other, at the moment of a scrape, which must come from the same thread.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class Series:
    """One set of buckets."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one; a value on a bound belongs below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Show it as it is now."""
        names = [str(floatToGoString(bound)) for bound in (*self._bounds, INF)]  # type: ignore[no-untyped-call]
        family.add_metric(labels, list(zip(names, itertools.accumulate(self._counts), strict=True)), self._sum)


class LoopHistogram(Collector):
    """Without ``label`` one series; with it one for each of ``values``, all of which are shown from the start."""

    def __init__(
        self,
        name: str,
        text: str,
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        label: str | None = None,
        values: Sequence[str] = (),
    ) -> None:
        assert list(buckets) == sorted(set(buckets)), buckets
        assert (label is None) == (not values), (label, values)
        self._name = name
        self._text = text
        self._labels = [] if label is None else [label]
        keys: list[tuple[str, ...]] = [(value,) for value in values] or [()]
        self._series = {key: Series(buckets) for key in keys}
        registry.register(self)

    def series(self, *value: str) -> Series:
        """The series of a label's value, or the only one."""
        return self._series[value]

    def observe(self, value: float) -> None:
        """Count one where there is no label."""
        self._series[()].observe(value)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """One family."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, series in self._series.items():
            series.add_to(family, labels)
        yield family
