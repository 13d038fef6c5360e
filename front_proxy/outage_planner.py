"""Plans without a scheduler, from the last picture of the cluster and by the scheduler's own core. Pure.

What the picture says about load grows old: it counts less with time and nothing after ``load_fade_s``. What this front
proxy placed itself is reserved until it ends. Other front proxies do the same unseen, so the workers' own admission has
the last word. Who finds no room waits in a line as the scheduler's, by the same settings; whatever happens may give him
his place, so nearly every method returns answers, and to whom they go.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping, Sequence

import msgspec

from scheduler.actions import Action, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from scheduler.events import (
    FrontJoined,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    RunningPlan,
    Tick,
    WorkerJoined,
    WorkerLoadReported,
    WorkerSuspected,
)
from scheduler.facts import WorkerFacts, WorkerLoad
from scheduler.profile import Random

SESSION = 1
# Loads are not faded more often than this, and not more seldom while anybody waits.
FADE_INTERVAL_S = 0.25
# Load that faded looks like a worker with nothing to do; that says nothing of what runs there.
NEVER_LEAKED_S = float("inf")

PlannerReply = ReplyPlan | ReplyRefusal | ReplyWaiting


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
        self.waiting: set[int] = set()
        """Plan ids of those who wait for a place."""
        self._core = SchedulerCore(msgspec.structs.replace(config, leak_after_s=NEVER_LEAKED_S), rng)
        self._load_fade_s = load_fade_s
        self._seen: dict[str, tuple[WorkerLoad, float]] = {}
        self._sessions = SESSION
        self._faded_s = now_s
        self._core.handle(FrontJoined(session=SESSION, front_proxy_id="this"), now_s)
        self.take_over(tuple(running), now_s)

    def show(
        self, workers: Sequence[tuple[WorkerFacts, WorkerLoad]], seen_s: float, now_s: float
    ) -> Sequence[PlannerReply]:
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
        return self.look(now_s)

    def plan(self, question: PlanRequested, now_s: float) -> Sequence[PlannerReply]:
        """Place a request, or let it wait; ``question.session`` is SESSION."""
        replies = [] if now_s < self._faded_s + FADE_INTERVAL_S else self.look(now_s)
        return [*replies, *self._noted(self._core.handle(question, now_s))]

    def take_over(self, plans: tuple[RunningPlan, ...], now_s: float) -> Sequence[PlannerReply]:
        """Reserve what plans take that somebody else made, also for one who waits here."""
        self.waiting.difference_update(plan.plan_id for plan in plans)
        return self._noted(self._core.handle(PlansRunning(session=SESSION, plans=plans), now_s))

    def ended(self, plan_id: int, outcome: str, output_tokens: int, now_s: float) -> Sequence[PlannerReply]:
        """Free what a plan reserved, whoever made it, or let go who waits. Idempotent."""
        self.waiting.discard(plan_id)
        ended = RequestEnded(session=SESSION, plan_id=plan_id, outcome=outcome, output_tokens=output_tokens)
        return self._noted(self._core.handle(ended, now_s))

    def let_go(self, running: Iterable[RunningPlan], now_s: float) -> Sequence[int]:
        """Let everybody go who waits, the first one first; who gets a place is none of them. ``running``: all plans."""
        gone = sorted(self.waiting)
        self.waiting.clear()
        # At once: one after the other, the last ones would be given the places that the first ones left them.
        self._core.handle(PlansRunning(session=SESSION, plans=tuple(running), complete=True), now_s)
        return gone

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
        assert sum(self._core.waiting().values()) == len(self.waiting), self.waiting

    def _noted(self, actions: Sequence[Action]) -> Sequence[PlannerReply]:
        replies = [action for action in actions if isinstance(action, PlannerReply)]
        for reply in replies:
            if isinstance(reply, ReplyWaiting):
                self.waiting.add(reply.plan_id)
            else:
                self.waiting.discard(reply.plan_id)
                self.plans_made += isinstance(reply, ReplyPlan)
        return replies

    def look(self, now_s: float) -> Sequence[PlannerReply]:
        """Time passed: loads fade, ejections end, and so do waits."""
        self._faded_s = now_s
        actions: list[Action] = []
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
            actions.extend(self._core.handle(report, now_s))
        # Behind the reports: they are also what keeps a worker from falling silent.
        actions.extend(self._core.handle(Tick(), now_s))
        return self._noted(actions)
