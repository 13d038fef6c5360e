"""When those who find no room shall come back: one after the other, at a share of the present pace. Pure."""

from __future__ import annotations

import math

from runtime.fading import PACE_MIN_PER_S

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


class Appointments:
    """One book. ``share`` of the pace is for those who were told to come back, the rest for who comes meanwhile.

    Who is told the line's length alone comes back with everybody else who was, and finds the line as long as before.
    Nobody is told more than ``max_s``, unless he must not come before: where it is not enough for all, they are spread
    over its second half.
    """

    def __init__(self, share: float, max_s: float) -> None:
        assert 0.0 < share <= 1.0, share
        self._share = share
        self._max_s = max_s
        self._beyond = 0
        # The work of those who were told and are not served yet, as far as the pace was what it was said to be.
        self._owed = 0.0
        self._at_s = 0.0
        self.until_s = float("-inf")
        """When the last one who was told will have been served, at the pace of then."""

    def book(self, work: float, now_s: float, *, pace: float, not_before_s: float, noted: bool = True) -> float:
        """When to come back with so much work, where ``pace`` of it is done each second, be it none.

        ``noted`` False: only say when, for somebody who comes back whenever he likes. Others wait no longer for it.
        """
        assert pace >= 0.0, pace
        share = max(self._share * pace, PACE_MIN_PER_S)
        self._owed = max(0.0, self._owed - share * (now_s - self._at_s))
        self._at_s = now_s
        wait_s = max(self._owed / share, not_before_s - now_s)
        if wait_s + work / share > self._max_s:
            # Multiples of the golden ratio, less their whole part, lie evenly however many there are.
            self._beyond += noted
            spread_s = self._max_s * (1.0 - 0.5 * (self._beyond * _GOLDEN % 1.0))
            return max(now_s + spread_s, not_before_s)
        if noted:
            self._owed = wait_s * share + work
            self.until_s = now_s + wait_s + work / share
        return now_s + wait_s
