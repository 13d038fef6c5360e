"""Whether an engine whose process lives has stopped working. Pure: every moment is an argument, and it asks nobody.

An engine tells of every step, of those too that compute only a part of a prompt, and answers a ping between two steps.
So the longest silence of an engine that works is its longest single step; one that is silent for longer stands still.
"""

from __future__ import annotations

import enum

# A look that comes later than so many intervals: this process stood still itself, and heard nobody meanwhile.
_LATE_INTERVALS = 2.0
# An engine may have nothing to tell. It is asked after this share of the silence that it is allowed.
_ASK_SHARE = 0.25


class Verdict(enum.Enum):
    """What a look came to."""

    WELL = "well"
    ASK = "ask"
    """It has not been heard for a while: ping it, once."""
    STALLED = "stalled"
    """It was silent for longer than it may be, and was asked meanwhile."""


class EngineWatch:
    """One engine's silence, looked at every ``interval_s``."""

    def __init__(self, *, stall_timeout_s: float, interval_s: float, now_s: float) -> None:
        assert stall_timeout_s > 0 and interval_s > 0, (stall_timeout_s, interval_s)
        self._stall_timeout_s = stall_timeout_s
        self._interval_s = interval_s
        self._looked_s = now_s
        self._asked = False
        self.silent_s = 0.0
        """How long it has said nothing, as far as this process was there to hear it."""

    def look(self, *, heard: bool, now_s: float) -> Verdict:
        """``heard``: it said anything since the last look. Time in which this process stood still does not count."""
        elapsed_s, self._looked_s = now_s - self._looked_s, now_s
        if heard:
            self.silent_s, self._asked = 0.0, False
        elif elapsed_s <= _LATE_INTERVALS * self._interval_s:
            self.silent_s += elapsed_s
        if self._asked:
            return Verdict.STALLED if self.silent_s >= self._stall_timeout_s else Verdict.WELL
        if self.silent_s >= _ASK_SHARE * self._stall_timeout_s:
            self._asked = True
            return Verdict.ASK
        return Verdict.WELL
