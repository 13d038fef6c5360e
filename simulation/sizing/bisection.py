"""The highest rate at which something is kept, from answers at single rates. Pure."""

from __future__ import annotations

import math

TOLERANCE = 0.03
"""Of the highest rate, as a share of it."""
BRACKET = 1.3
STEPS_UP_MAX, STEPS_DOWN_MAX = 4, 2
"""Out of the known range. Where no rate is low enough, replays of few requests an hour would take long."""
BRACKETS_WIDER_MAX = 2


class Bisection:
    """Steps from a guess in widening steps until the highest rate lies between two, then halves by ratio."""

    def __init__(self, rate_rps: float, *, kept: bool, guess_rps: float = 0.0) -> None:
        # The highest rate that was kept, and the lowest that was not; 0: none yet.
        self.low_rps: float = rate_rps if kept else 0.0
        self._high_rps: float = 0.0 if kept else rate_rps
        self._last_rps, self._last_kept = rate_rps, kept
        self._guess_rps = guess_rps if guess_rps > 0.0 and (guess_rps > rate_rps) == kept else 0.0
        self._steps = 0

    @property
    def over(self) -> bool:
        """Whether it is known well enough, or cannot be found."""
        if self.low_rps and self._high_rps:
            return self._high_rps <= self.low_rps * (1 + TOLERANCE)
        return self._steps >= (STEPS_UP_MAX if self.low_rps else STEPS_DOWN_MAX)

    @property
    def next_rps(self) -> float:
        """To be tried."""
        if self._guess_rps:
            return self._guess_rps
        # Each step is wider than the one before.
        wide = BRACKET ** (1 << min(self._steps, BRACKETS_WIDER_MAX))
        stepped = self._last_rps * wide if self._last_kept else self._last_rps / wide
        if not (self.low_rps and self._high_rps):
            return stepped
        middle = math.sqrt(self.low_rps * self._high_rps)
        return min(stepped, middle) if self._last_kept else max(stepped, middle)

    def tell(self, *, keeps: bool) -> None:
        """What came of ``next_rps``."""
        rate_rps = self.next_rps
        if self._guess_rps:
            self._guess_rps = 0.0
        elif not (self.low_rps and self._high_rps):
            self._steps += 1
        self._last_rps, self._last_kept = rate_rps, keeps
        if keeps:
            self.low_rps = rate_rps
        else:
            self._high_rps = rate_rps
