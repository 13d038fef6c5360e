"""Mooncake's Conductor: the worker whose time to the first token is estimated to be least."""

from __future__ import annotations

from collections.abc import Sequence

from bench.policies.learnt import LearntTimes
from bench.policies.seen import PeerPolicy, Seen, least
from scheduler.api.chance import Random
from simulation.replay.policy import (
    Decision,
    FirstToken,
    LoadReported,
    PolicyEvent,
    Request,
    RequestArrived,
    RequestEnded,
    Run,
)


class Mooncake(PeerPolicy):
    """Algorithm 1 of "Mooncake" (FAST'25, arXiv 2407.00079 §6): least ``T_queue + T_prefill(length, prefix)``.

    ``T_prefill`` is a regression over length and prefix, ``T_queue`` the sum over the prompts that wait there. Decode
    goes where the predicted time between tokens is least. A request that asks for a TTFT or ITL that is predicted to be
    missed is refused (§7). Its other branch pulls KV from the prefill worker that holds more (``T_transfer``): engines
    here pull for decode only, so the branch is never taken.
    """

    blocks_from = "events"

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._times = LearntTimes()
        # Per prefill worker: the predicted time of each prompt in flight, oldest first, and when the oldest started.
        self._queues: dict[str, dict[int, float]] = {}
        self._started_s: dict[str, float] = {}
        self._queue_of: dict[int, str] = {}

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """The least estimated time to the first token."""
        return least(self.prefills, lambda worker: self.ttft_s(worker, request, now_s), self.rng)

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """The least predicted time between tokens."""
        return least(self.decodes, lambda worker: self._step_s(worker, request), self.rng)

    def ttft_s(self, worker: Seen, request: Request, now_s: float) -> float:
        """``T_queue + T_prefill``."""
        return self._queue_s(worker, now_s) + self._prefill_s(worker, request)

    def objection(self, request: Request, prefill: Seen, decode: Seen, now_s: float) -> str:
        """Refuse early what would be late."""
        if 0 < request.ttft_slo_s < self.ttft_s(prefill, request, now_s):
            return "ttft"
        return "itl" if 0 < request.itl_slo_s < self._step_s(decode, request) else ""

    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        """Learn how long steps take, and keep the queues, too."""
        match event:
            case LoadReported():
                self._times.learn(event.steps)
            case FirstToken():
                self._leave(event.request_id, now_s)
            case RequestEnded():
                self._leave(event.request_id, now_s)
            case _:
                pass
        decisions = super().handle(event, now_s)
        if isinstance(event, RequestArrived):
            for decision in decisions:
                if isinstance(decision, Run) and decision.prefill is not None:
                    self._enter(event.request, decision.prefill, now_s)
        return decisions

    def _enter(self, request: Request, worker_id: str, now_s: float) -> None:
        worker = next(one for one in self.prefills if one.worker_id == worker_id)
        queue = self._queues.setdefault(worker_id, {})
        if not queue:
            self._started_s[worker_id] = now_s
        queue[request.request_id] = self._prefill_s(worker, request)
        self._queue_of[request.request_id] = worker_id

    def _leave(self, request_id: int, now_s: float) -> None:
        """The prompt is computed, or given up: the next one starts."""
        if (worker_id := self._queue_of.pop(request_id, None)) is not None:
            del self._queues[worker_id][request_id]
            self._started_s[worker_id] = now_s

    def _prefill_s(self, worker: Seen, request: Request) -> float:
        held = worker.held_tokens(request)
        return self._times.prefill_s(request.prompt_tokens - held, held)

    def _queue_s(self, worker: Seen, now_s: float) -> float:
        queue = self._queues.get(worker.worker_id)
        if not queue:
            return 0.0
        oldest_s = next(iter(queue.values()))
        return sum(queue.values()) - min(oldest_s, now_s - self._started_s[worker.worker_id])

    def _step_s(self, worker: Seen, request: Request) -> float:
        return self._times.decode_step_s(worker.requests + 1, worker.tokens + request.prompt_tokens)
