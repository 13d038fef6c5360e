"""Plans without a scheduler, from the last picture of the cluster and by the scheduler's own core. Pure.

What the picture says about load grows old: it counts less with time and nothing after ``load_fade_s``. What this front
proxy placed itself is reserved until it ends. Other front proxies do the same unseen, so the workers' own admission has
the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping, Sequence

import msgspec

from scheduler.actions import ReplyPlan, ReplyRefusal
from scheduler.config import PriorityClassConfig, SchedulerConfig, WaitingConfig
from scheduler.core import SchedulerCore
from scheduler.events import (
    FrontJoined,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    RunningPlan,
    WorkerJoined,
    WorkerLoadReported,
    WorkerSuspected,
)
from scheduler.facts import WorkerFacts, WorkerLoad
from scheduler.profile import Random

SESSION = 1
# Load that is only remembered would never let those who wait go on.
_NONE = PriorityClassConfig(waiting_max=0)
NOBODY_WAITS = WaitingConfig(interactive=_NONE, default=_NONE, batch=_NONE)
# Loads are not faded more often than this.
FADE_INTERVAL_S = 0.25


class OutagePlanner:
    """One outage. Time is an argument and never goes back."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        running: Iterable[RunningPlan],
        load_fade_s: float,
        rng: Random | None,
        now_s: float,
    ) -> None:
        self.plans_made = 0
        self._core = SchedulerCore(msgspec.structs.replace(config, waiting=NOBODY_WAITS), rng)
        self._load_fade_s = load_fade_s
        self._seen: dict[str, tuple[WorkerLoad, float]] = {}
        self._sessions = SESSION
        self._faded_s = now_s
        self._core.handle(FrontJoined(session=SESSION, front_proxy_id="this"), now_s)
        self.take_over(tuple(running), now_s)

    def show(self, workers: Sequence[tuple[WorkerFacts, WorkerLoad]], seen_s: float, now_s: float) -> None:
        """Take over a picture that was true at ``seen_s``. Workers that are not in it stay as they are."""
        for facts, load in workers:
            known = self._core.cluster.get(facts.worker_id)
            if known is not None and known.facts.epoch > facts.epoch:
                # An older picture, of an engine that is no more.
                continue
            if known is None or known.facts.epoch != facts.epoch:
                self._sessions += 1
                self._core.handle(WorkerJoined(session=self._sessions, facts=facts), now_s)
            self._seen[facts.worker_id] = (load, seen_s)
        self._fade(now_s)

    def plan(self, question: PlanRequested, now_s: float) -> ReplyPlan | ReplyRefusal:
        """Place a request; ``question.session`` is SESSION."""
        if now_s >= self._faded_s + FADE_INTERVAL_S:
            self._fade(now_s)
        replies = self._core.handle(question, now_s)
        (reply,) = (reply for reply in replies if isinstance(reply, ReplyPlan | ReplyRefusal))
        if isinstance(reply, ReplyPlan):
            self.plans_made += 1
        return reply

    def take_over(self, plans: tuple[RunningPlan, ...], now_s: float) -> None:
        """Reserve what plans take that somebody else made."""
        self._core.handle(PlansRunning(session=SESSION, plans=plans), now_s)

    def ended(self, plan_id: int, output_tokens: int, now_s: float) -> None:
        """Free what a plan reserved, whoever made it. Idempotent."""
        self._core.handle(RequestEnded(session=SESSION, plan_id=plan_id, output_tokens=output_tokens), now_s)

    def suspect(self, worker_id: str, epoch: int, reason: str, now_s: float, request_id: str = "") -> None:
        """A worker could not be used."""
        suspected = WorkerSuspected(worker_id=worker_id, epoch=epoch, reason=reason, request_id=request_id)
        self._core.handle(suspected, now_s)

    @property
    def reserved_blocks(self) -> Mapping[str, int]:
        """KV blocks reserved, by worker."""
        return {worker.worker_id: worker.reserved_blocks for worker in self._core.cluster.workers.values()}

    @property
    def plan_ids(self) -> KeysView[int]:
        """Whose reservations it keeps."""
        return self._core.fronts[SESSION].plans.keys()

    def check(self) -> None:
        """Assert every invariant of the books. Slow: for tests."""
        self._core.check()

    def _fade(self, now_s: float) -> None:
        self._faded_s = now_s
        for worker_id, (load, seen_s) in self._seen.items():
            worker = self._core.cluster.get(worker_id)
            if worker is None:
                continue
            share = max(0.0, 1.0 - (now_s - seen_s) / self._load_fade_s)
            faded = msgspec.structs.replace(
                load,
                requests_running=int(load.requests_running * share),
                requests_waiting=int(load.requests_waiting * share),
                kv_blocks_used=int(load.kv_blocks_used * share),
                prefill_tokens_queued=int(load.prefill_tokens_queued * share),
            )
            # Faded, a queue seems worked off at a pace that says nothing of the worker.
            report = WorkerLoadReported(session=worker.session, worker_id=worker_id, load=faded, remembered=True)
            self._core.handle(report, now_s)
