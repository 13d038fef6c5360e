"""Requests on a worker: a filter for its own limit and a score. Counts the larger of reported and planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


class RequestSlotFilter:
    """Drops workers that would refuse one more request."""

    name: Final = "request_slots"

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """Those below their own limit; 0 means no limit."""
        return [worker for worker in workers if not 0 < worker.requests_max <= worker.request_count]


class RequestCountScorer:
    """Prefers the worker with fewer requests."""

    name: Final = "request_count"

    def __init__(self, half_score_requests: int) -> None:
        self._half_score_requests = half_score_requests

    def score(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[float]:
        """1 for none, one half at ``half_score_requests``, towards 0 beyond."""
        half = self._half_score_requests
        return [half / (half + worker.request_count) for worker in workers]
