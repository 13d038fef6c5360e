"""Keeps workers that have not failed this request before. Remembers nothing: the request says which did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


class ExcludedFilter:
    """Drops the workers that the request names."""

    name: Final = "excluded"

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """All but the named ones."""
        excluded = ask.excluded_worker_ids
        if not excluded:
            return workers
        return [worker for worker in workers if worker.worker_id not in excluded]
