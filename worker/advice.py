"""When a request that a worker has no room for should come back, by the pace at which it gives room back. Pure."""

from __future__ import annotations

from runtime.appointments import Appointments
from runtime.release_rate import ReleaseRate
from worker.config import WorkerConfig


class Advice:
    """One worker's advice. Whoever is refused gets a time of his own: together they would find no room again."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._requests = ReleaseRate(config.release_window_s)
        self._blocks = ReleaseRate(config.release_window_s)
        self._appointments = Appointments(config.come_back_share, config.retry_after_max_s)

    def released(self, blocks: int, now_s: float) -> None:
        """A request ended, which had been admitted with so many blocks."""
        self._requests.released(1, now_s)
        self._blocks.released(blocks, now_s)

    def retry_after_s(self, blocks: int, now_s: float, *, noted: bool = True) -> float:
        """When there is room for one more request, or for one of so many blocks where ``blocks`` are missing.

        ``noted``: as of ``Appointments.book``.
        """
        config = self._config
        pace = self._blocks.per_s(now_s) if blocks else self._requests.per_s(now_s)
        work = float(blocks or 1)
        # Nothing has ended yet: the shortest advice, as far apart as that is long.
        pace = pace or work / config.retry_after_min_s
        not_before_s = now_s + max(min(work / pace, config.retry_after_max_s), config.retry_after_min_s)
        return self._appointments.book(work, now_s, pace=pace, not_before_s=not_before_s, noted=noted) - now_s
