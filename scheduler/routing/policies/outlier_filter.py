"""Keeps workers that do their work. Why one is avoided is ``outliers``' business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


class OutlierFilter:
    """Drops ejected workers while anybody else is there: one that may work is better than none."""

    name: Final = "outlier"

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """Those in service and those on trial, or all when there are none."""
        return [worker for worker in workers if not worker.avoided] or workers
