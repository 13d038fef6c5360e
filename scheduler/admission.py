"""How many plans may be in flight, and when a refused one should come back. Holds counters, chooses no worker."""

from __future__ import annotations

import math


class ReleaseRate:
    """Blocks freed per second, forgetting older releases exponentially."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._blocks = 0.0
        self._at_s = 0.0

    def released(self, blocks: int, now_s: float) -> None:
        """Count a release."""
        self._decay(now_s)
        self._blocks += blocks

    def blocks_per_s(self, now_s: float) -> float:
        """The present rate."""
        self._decay(now_s)
        return self._blocks / self._window_s

    def _decay(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._at_s)
        self._blocks *= math.exp(-elapsed_s / self._window_s)
        self._at_s = max(self._at_s, now_s)


class Admission:
    """The bound on plans in flight and the advice that goes with a refusal."""

    def __init__(
        self, *, plans_in_flight_max: int, retry_after_min_s: float, retry_after_max_s: float, release_window_s: float
    ) -> None:
        self._plans_in_flight_max = plans_in_flight_max
        self.retry_after_min_s = retry_after_min_s
        self._retry_after_max_s = retry_after_max_s
        self._rate = ReleaseRate(release_window_s)

    def has_room(self, plans_in_flight: int) -> bool:
        """Whether one more plan may be granted."""
        return plans_in_flight < self._plans_in_flight_max

    def released(self, blocks: int, now_s: float) -> None:
        """A plan ended and gave these blocks back."""
        self._rate.released(blocks, now_s)

    def retry_after_s(self, missing_blocks: int, now_s: float) -> float:
        """When this many blocks should be free at the present pace, within the configured bounds."""
        pace = self._rate.blocks_per_s(now_s)
        # Before the first release nothing is known: the middle of the bounds, by their ratio.
        unknown_s = math.sqrt(self.retry_after_min_s * self._retry_after_max_s)
        wait_s = missing_blocks / pace if pace > 0 else unknown_s
        return min(self._retry_after_max_s, max(self.retry_after_min_s, wait_s))
