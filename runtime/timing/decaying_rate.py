"""A pace that forgets: an amount over the time in which it came, both fading exponentially. Pure."""

from __future__ import annotations

import math

KNOWN_AFTER_S = 0.5
"""Counting for less long than this says nothing about a pace."""
PACE_MIN_PER_S = 1e-6
"""A smaller pace (one in eleven days) counts as unknown: to divide by it would give infinity."""


class DecayingRate:
    """``at`` tells it the time, ``add`` what came. Time that does not count fades nothing either."""

    __slots__ = ("_at_s", "_counts", "_window_s", "amount", "seconds")

    def __init__(self, window_s: float) -> None:
        self.amount = 0.0
        """What is remembered of all that came."""
        self.seconds = 0.0
        """What is remembered of the time in which it came."""
        self._window_s = window_s
        self._at_s = 0.0
        # Before the first call no time counts.
        self._counts = False

    def at(self, now_s: float, *, counts: bool = True) -> None:
        """It is ``now_s``; ``counts`` says whether the time from now on counts. A clock that went back is ignored."""
        if self._counts:
            self.passed(max(0.0, now_s - self._at_s))
        self._at_s, self._counts = max(self._at_s, now_s), counts

    def passed(self, elapsed_s: float) -> None:
        """So much time passed that counts."""
        kept = math.exp(-elapsed_s / self._window_s)
        self.amount *= kept
        self.seconds = self.seconds * kept + elapsed_s

    def add(self, amount: float) -> None:
        """So much came."""
        self.amount += amount

    @property
    def per_s(self) -> float | None:
        """The present pace; None while it is not known, and when so little came that nothing is known any more."""
        if self.seconds < KNOWN_AFTER_S:
            return None
        pace = self.amount / self.seconds
        return pace if pace >= PACE_MIN_PER_S else None
