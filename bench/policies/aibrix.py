"""AIBrix's router for prefill and decode pools."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.policies.seen import PeerPolicy, Seen, least
from scheduler.api.chance import Random
from simulation.replay.policy import Decision, LoadReported, PolicyEvent, Request

STANDARD_DEVIATIONS = 1.0
FREE_KV_MIN = 0.001
# How far back the tokens per second of a decode worker are averaged.
THROUGHPUT_WINDOW_S = 10.0


def prefill_score(held_percent: float, requests: int, requests_most: float) -> float:
    """``(100 - match%) * 0.1 + requests / most requests``; least wins."""
    return (100.0 - held_percent) * 0.1 + requests / requests_most


def decode_score(requests_share: float, throughput_share: float, free_share: float) -> float:
    """``(requests + (1 - throughput)) / free KV``, each as a share of the largest of all workers; least wins."""
    return (requests_share + 1.0 - throughput_share) / free_share


class Aibrix(PeerPolicy):
    """``prefix_cache`` for prefill and ``load_balancing`` for decode, the defaults of the ``pd`` router.

    vllm-project/aibrix pkg/plugins/gateway/algorithms/pd/prefill_scorer.go (08e6cac) and decode_scorer.go (0779ef5);
    prefill workers with more requests than mean + standard deviation are passed by (pd_disaggregation.go). Its table of
    prefixes is fed by its own decisions. All workers count as one RoleSet, so that any pair is allowed.
    """

    blocks_from = "decisions"

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        # Per worker: output tokens a second, and when it last reported.
        self._pace: dict[str, tuple[float, float]] = {}

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """By matched share, then by requests."""
        loads = [worker.requests for worker in self.prefills]
        bound = statistics.fmean(loads) + STANDARD_DEVIATIONS * statistics.pstdev(loads)
        near = [worker for worker in self.prefills if worker.requests <= bound]
        most = max(1.0, *loads)

        def score(worker: Seen) -> float:
            return prefill_score(int(100 * worker.held_share(request)), worker.requests, most)

        return least(near, score, self.rng)

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """By requests, throughput and free KV."""
        requests_most = max(1.0, *(worker.requests for worker in self.decodes))
        pace_most = max(1.0, *(pace for pace, _ in self._pace.values())) if self._pace else 1.0
        free_most = max(max(FREE_KV_MIN, 1.0 - worker.kv_used) for worker in self.decodes)

        def score(worker: Seen) -> float:
            pace, _ = self._pace.get(worker.worker_id, (0.0, 0.0))
            free = max(FREE_KV_MIN, 1.0 - worker.kv_used)
            return decode_score(worker.requests / requests_most, pace / pace_most, free / free_most)

        return least(self.decodes, score, self.rng)

    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        """Average the tokens a second of each decode worker, too."""
        if isinstance(event, LoadReported):
            pace, before_s = self._pace.get(event.worker_id, (0.0, 0.0))
            weight = min(1.0, (now_s - before_s) / THROUGHPUT_WINDOW_S)
            took_s = sum(step.duration_s for step in event.steps)
            now = sum(step.decode_requests for step in event.steps) / took_s if took_s else 0.0
            self._pace[event.worker_id] = pace + weight * (now - pace), now_s
        return super().handle(event, now_s)
