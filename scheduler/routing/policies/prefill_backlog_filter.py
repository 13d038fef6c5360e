"""Keeps prefill queues short: what waits beyond this bound waits in the scheduler, where classes and tenants share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


class PrefillBacklogFilter:
    """Drops workers whose queue is predicted to last too long. An idle one, or one of unknown speed, is kept."""

    name: Final = "prefill_backlog"

    def __init__(self, wait_max_s: float) -> None:
        self._wait_max_s = wait_max_s

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """Those that would start soon enough."""
        longest_s = self._wait_max_s
        return [
            worker
            for worker in workers
            if worker.queued_tokens <= longest_s * worker.speed.tokens_per_s or not worker.speed.observed
        ]
