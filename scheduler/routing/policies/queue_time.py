"""Predicted queueing: how long a prompt waits before its computation starts. Measures nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


def predicted_wait_s(worker: Worker) -> float:
    """Prompt tokens ahead, reported or not yet, over the worker's observed speed."""
    return worker.queued_tokens / worker.speed.tokens_per_s


class QueueTimeScorer:
    """Prefers the worker that will start soonest."""

    name: Final = "queue_time"

    def __init__(self, half_score_s: float) -> None:
        self._half_score_s = half_score_s

    def score(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[float]:
        """1 for no wait, one half at ``half_score_s``, towards 0 beyond."""
        half_s = self._half_score_s
        return [half_s / (half_s + worker.queued_tokens / worker.speed.tokens_per_s) for worker in workers]
