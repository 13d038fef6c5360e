"""How many plans may be in flight, and when a refused one should come back. Holds counters, chooses no worker."""

from __future__ import annotations

import math

from runtime.appointments import Appointments
from runtime.release_rate import ReleaseRate


class Admission:
    """The bound on plans in flight and the advice that goes with a refusal, where no line knows better."""

    def __init__(
        self,
        *,
        plans_in_flight_max: int,
        retry_after_min_s: float,
        retry_after_max_s: float,
        release_window_s: float,
        come_back_share: float,
    ) -> None:
        self._plans_in_flight_max = plans_in_flight_max
        self.retry_after_min_s = retry_after_min_s
        self._retry_after_max_s = retry_after_max_s
        self._rate = ReleaseRate(release_window_s)
        self._appointments = Appointments(come_back_share, retry_after_max_s)

    def has_room(self, plans_in_flight: int) -> bool:
        """Whether one more plan may be granted."""
        return plans_in_flight < self._plans_in_flight_max

    def released(self, blocks: int, now_s: float) -> None:
        """A plan ended and gave these blocks back."""
        self._rate.released(blocks, now_s)

    def retry_after_s(self, missing_blocks: int, now_s: float, *, noted: bool = True) -> float:
        """When this many blocks should be free at the present pace, and nobody else comes back; bounded.

        ``noted``: as of ``Appointments.book``.
        """
        pace = self._rate.per_s(now_s)
        # Before the first release nothing is known: the middle of the bounds, by their ratio.
        unknown_s = math.sqrt(self.retry_after_min_s * self._retry_after_max_s)
        wait_s = missing_blocks / pace if pace > 0 else unknown_s
        wait_s = min(self._retry_after_max_s, max(self.retry_after_min_s, wait_s))
        at_s = self._appointments.book(wait_s, now_s, pace=1.0, not_before_s=now_s + wait_s, noted=noted)
        return at_s - now_s
