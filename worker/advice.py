"""When a request that a worker has no room for should come back, by the pace at which it gives room back. Pure."""

from __future__ import annotations

from runtime.decaying_rate import DecayingRate
from runtime.retry_after import retry_after_s
from worker.config import WorkerConfig

RELEASE_WINDOW_S = 10.0
"""Memory of that pace."""


class Advice:
    """One worker's advice."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._requests = DecayingRate(RELEASE_WINDOW_S)
        self._blocks = DecayingRate(RELEASE_WINDOW_S)

    def released(self, blocks: int, now_s: float) -> None:
        """A request ended, which had been admitted with so many blocks."""
        for rate, amount in ((self._requests, 1), (self._blocks, blocks)):
            rate.at(now_s)
            rate.add(amount)

    def retry_after_s(self, blocks: int, now_s: float, draw: float) -> float:
        """For a request of so many blocks where ``blocks`` are missing; 0: another request's place is.

        ``draw``: by chance, from [0, 1).
        """
        rate = self._blocks if blocks else self._requests
        rate.at(now_s)
        config = self._config
        return retry_after_s(
            blocks or 1, rate.per_s, min_s=config.retry_after_min_s, max_s=config.retry_after_max_s, draw=draw
        )
