"""llm-d's endpoint picker: its weighted scorers, and sticky-until-saturated that took their place."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from bench.policies.learnt import LearntTimes
from bench.policies.seen import PeerPolicy, Seen, least
from scheduler.api.chance import Random
from simulation.replay.policy import Decision, LoadReported, PolicyEvent, Request

# ``prefix-cache-affinity-filter``: affinityThreshold and maxTTFTPenaltyMs.
AFFINITY_THRESHOLD = 0.8
TTFT_PENALTY_MAX_S = 18.0
# Prompt tokens of one unloaded step, by which its users measure their peak prefill throughput.
CHUNK_TOKENS = 8192
# Weights of the scorers: prefix, queue, KV, no-hit LRU.
PREFIX, QUEUE, KV, LRU = 3.0, 2.0, 2.0, 2.0


class LlmdSticky(PeerPolicy):
    """Sticky until saturated: the affinity filter, then the token-load scorer, for prefill; active requests for decode.

    llm-d/llm-d-router pkg/epp/framework/plugins/scheduling/filter/prefixcacheaffinity/README.md (066c20e) and the llm-d
    blog of 2026-08-17. The peak prefill throughput is learnt from reports; its users measure it on their machines.
    """

    blocks_from = "events"

    def __init__(self, rng: Random, penalty_max_s: float = TTFT_PENALTY_MAX_S) -> None:
        super().__init__(rng)
        self._penalty_max_s = penalty_max_s
        self._times = LearntTimes()

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """Fewest uncached tokens in flight, this request's included, among those that hold most of the prompt."""
        return least(
            self._kept(request),
            lambda worker: worker.tokens + request.prompt_tokens - worker.held_tokens(request),
            self.rng,
        )

    def _kept(self, request: Request) -> Sequence[Seen]:
        """Those that hold most of the prompt, unless they are too busy; else all."""
        sticky = [worker for worker in self.prefills if worker.held_share(request) >= AFFINITY_THRESHOLD]
        others = [worker for worker in self.prefills if worker.held_share(request) < AFFINITY_THRESHOLD]
        if not sticky or not others:
            return self.prefills
        token_s = self._times.prefill_s(CHUNK_TOKENS, 0) / CHUNK_TOKENS
        ahead = min(worker.tokens for worker in sticky) - min(worker.tokens for worker in others)
        return self.prefills if ahead * token_s > self._penalty_max_s else sticky

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """Fewest active requests: the scorer that is advised where decode is the bound."""
        return least(self.decodes, operator.attrgetter("requests"), self.rng)

    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        """Learn how fast prompts are computed, too."""
        if isinstance(event, LoadReported):
            self._times.learn(event.steps)
        return super().handle(event, now_s)


class LlmdWeighted(PeerPolicy):
    """``3 * prefix + 2 * queue + 2 * kv + 2 * no-hit LRU``, each in [0, 1]; the most wins.

    llm-d/llm-d-router pkg/epp/framework/plugins/scheduling/scorer (683100d); the weights are those of the blend that
    its blog of 2026-08-17 calls hard to tune. Queue and KV use are what workers report.
    """

    blocks_from = "events"

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        # Prefill workers, and decode workers, by when they last got a request of which no worker held a part.
        self._cold: dict[str, int] = {}
        self._turn = 0

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """The best blend."""
        return self._best(self.prefills, request)

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """The best blend."""
        return self._best(self.decodes, request)

    def _best(self, workers: list[Seen], request: Request) -> Seen:
        held = {worker.worker_id: worker.held_share(request) for worker in workers}
        cold = not any(held.values())
        queues = queue_scores([worker.load.requests_waiting for worker in workers])
        order = sorted(workers, key=lambda worker: self._cold.get(worker.worker_id, 0))
        last = max(1, len(workers) - 1)
        cost = {
            worker.worker_id: -(
                PREFIX * held[worker.worker_id]
                + QUEUE * queue
                + KV * (1.0 - worker.kv_used)
                + LRU * (1.0 - order.index(worker) / last if cold else 0.5)
            )
            for worker, queue in zip(workers, queues, strict=True)
        }
        best = least(workers, lambda worker: cost[worker.worker_id], self.rng)
        if cold:
            self._turn += 1
            self._cold[best.worker_id] = self._turn
        return best


def queue_scores(waiting: Sequence[int]) -> list[float]:
    """1 for the shortest queue, 0 for the longest; 1 for all where they are equal."""
    most, fewest = max(waiting), min(waiting)
    return [(most - one) / (most - fewest) if most > fewest else 1.0 for one in waiting]
