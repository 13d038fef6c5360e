"""Keeps workers that take new requests. Knows nothing of why one does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


class ReadyFilter:
    """Drops workers that are starting, draining or stopped."""

    name: Final = "ready"

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """The ready ones."""
        return [worker for worker in workers if worker.ready]
