"""Avoids workers that a front proxy lately could not use. Never refuses a request for it: suspicion is advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


class SuspectFilter:
    """Drops suspects while anybody else is left."""

    name: Final = "suspect"

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """The unsuspected ones, or all when there are none."""
        return [worker for worker in workers if worker.suspect_until_s <= now_s] or workers
