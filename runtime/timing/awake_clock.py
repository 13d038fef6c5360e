"""Timeouts that do not count the time in which this process stood still (paused, swapped out). Pure.

A process that was stopped for a minute has heard nothing for a minute. That is not the fault of its peers.
"""

from __future__ import annotations

import enum

LATE_INTERVALS = 2.0
"""If a look comes later than this many intervals, this process was paused."""
_ASK_SHARE = 0.25
"""A silent peer is asked after this share of its timeout."""


class AwakeClock:
    """Tells which time counts, by looks that the caller takes every ``interval_s``."""

    def __init__(self, interval_s: float, now_s: float = 0.0) -> None:
        assert interval_s > 0, interval_s
        self._interval_s = interval_s
        self._looked_s = now_s
        self.lost_s = 0.0
        """Time before the last look in which this process stood still."""

    def start(self, now_s: float) -> None:
        """Begin: the time until now does not count."""
        self._looked_s = now_s

    def look(self, now_s: float) -> float:
        """The time since the last call, or 0 if this process stood still meanwhile."""
        elapsed_s, self._looked_s = max(now_s - self._looked_s, 0.0), now_s
        self.lost_s = elapsed_s if elapsed_s > LATE_INTERVALS * self._interval_s else 0.0
        return elapsed_s - self.lost_s


class Verdict(enum.Enum):
    """What a look at a peer came to."""

    WELL = "well"
    ASK = "ask"
    """It has been silent for a while: ask it, once."""
    EXPIRED = "expired"
    """It was silent for the whole timeout, and was asked meanwhile."""


class PauseAwareTimeout:
    """The silence of one peer, looked at every ``interval_s``."""

    def __init__(self, *, timeout_s: float, interval_s: float, now_s: float) -> None:
        assert timeout_s > 0, timeout_s
        self._clock = AwakeClock(interval_s, now_s)
        self._timeout_s = timeout_s
        self._asked = False
        self.silent_s = 0.0
        """How long the peer has said nothing, as far as this process was awake to hear it."""

    def look(self, *, heard: bool, now_s: float) -> Verdict:
        """``heard``: the peer said something since the last look."""
        awake_s = self._clock.look(now_s)
        if heard:
            self.silent_s, self._asked = 0.0, False
        else:
            self.silent_s += awake_s
        if self._asked:
            return Verdict.EXPIRED if self.silent_s >= self._timeout_s else Verdict.WELL
        if self.silent_s >= _ASK_SHARE * self._timeout_s:
            self._asked = True
            return Verdict.ASK
        return Verdict.WELL
