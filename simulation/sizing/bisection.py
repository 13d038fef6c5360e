"""The highest rate at which something is kept, from answers at single rates. Pure."""

from __future__ import annotations

import math

TOLERANCE = 0.03
"""Of the highest rate, as a share of it."""
BRACKET = 1.3
BRACKETS_MAX = 8
BRACKETS_WIDER_MAX = 2


class Bisection:
    """Brackets the highest rate that is kept from one that is known, then halves by ratio."""

    def __init__(self, rate_rps: float, *, kept: bool) -> None:
        # The highest rate that was kept, and the lowest that was not; 0: none yet.
        self.low_rps: float = rate_rps if kept else 0.0
        self._high_rps: float = 0.0 if kept else rate_rps
        self._brackets = 0

    @property
    def over(self) -> bool:
        """Whether it is known well enough, or cannot be found."""
        found = bool(self.low_rps and self._high_rps) and self._high_rps <= self.low_rps * (1 + TOLERANCE)
        return found or self._brackets > BRACKETS_MAX

    @property
    def next_rps(self) -> float:
        """To be tried."""
        # Each bracket is wider than the one before.
        wide = BRACKET ** (1 << min(self._brackets, BRACKETS_WIDER_MAX))
        if not self._high_rps:
            return self.low_rps * wide
        return math.sqrt(self.low_rps * self._high_rps) if self.low_rps else self._high_rps / wide

    def tell(self, *, keeps: bool) -> None:
        """What came of ``next_rps``."""
        rate_rps = self.next_rps
        if not (self.low_rps and self._high_rps):
            self._brackets += 1
        if keeps:
            self.low_rps = rate_rps
        else:
            self._high_rps = rate_rps
