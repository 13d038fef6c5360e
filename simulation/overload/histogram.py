"""Quantiles of durations in constant memory, within a few percent. Forgets single values."""

from __future__ import annotations

import math
from collections import Counter

# Neighbouring buckets differ by 2 %.
_RATIO_LOG = math.log(1.02)
_LEAST_S = 1e-4


class Spread:
    """A histogram with geometric buckets."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()

    def add(self, value_s: float) -> None:
        """Count one value."""
        self._buckets[math.ceil(math.log(max(value_s, _LEAST_S) / _LEAST_S) / _RATIO_LOG)] += 1

    def quantile(self, share: float) -> float:
        """The value that this share of all does not exceed; 0 of none."""
        left = share * self._buckets.total()
        for bucket, count in sorted(self._buckets.items()):
            left -= count
            if left <= 0:
                return _LEAST_S * math.exp(bucket * _RATIO_LOG)
        return 0.0
