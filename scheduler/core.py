"""The scheduler's decisions: events in, actions out. No clock, no I/O; chance only through an argument.

Holds the membership of workers and front proxies and the reservations between them. ``check`` asserts, among others:
a worker's reserved blocks are the sum over the plans that name it and never exceed its total; no reservation outlives
its worker or its front proxy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import assert_never

import msgspec

from runtime.failures import Failure, FailureKind
from scheduler.actions import (
    AcceptWorker,
    Action,
    DrainWorker,
    DropWorker,
    Placement,
    PublishView,
    RejectWorker,
    ReplyPlan,
    ReplyRefusal,
)
from scheduler.admission import Admission
from scheduler.cluster import ClusterState, PlanKey, Worker
from scheduler.config import SchedulerConfig
from scheduler.disaggregation import Reason
from scheduler.events import (
    DrainRequested,
    Event,
    FrontJoined,
    FrontLeft,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    RunningPlan,
    Tick,
    WorkerJoined,
    WorkerLeft,
    WorkerLoadReported,
    WorkerSuspected,
)
from scheduler.facts import WorkerFacts
from scheduler.placement import Cause, Chosen, NotPlaced, Planner
from scheduler.profile import Probe, Random

STORY_EVENTS_MAX = 64

# So frequent that they would push everything else out of the story.
UNTOLD = (PlansRunning, RequestEnded, Tick, WorkerLoadReported)

_KIND: dict[Cause, FailureKind] = {
    "plans_in_flight": FailureKind.EXHAUSTED,
    "no_headroom": FailureKind.EXHAUSTED,
    "decode_slots": FailureKind.EXHAUSTED,
    "prefill_slots": FailureKind.EXHAUSTED,
    "no_worker": FailureKind.UNAVAILABLE,
    "too_large": FailureKind.BAD_REQUEST,
    "plan_id_in_use": FailureKind.BAD_REQUEST,
}


class GrantedPlan(msgspec.Struct, frozen=True, gc=False):
    """A plan that has not ended. Names incarnations: one that left may return with what it holds, one restarted not."""

    request_id: str
    prefill: Placement | None
    decode: Placement | None
    decode_blocks: int


class Front:
    """One front proxy's stream and its plans in flight, by plan id."""

    __slots__ = ("front_proxy_id", "plans")

    def __init__(self, front_proxy_id: str) -> None:
        self.front_proxy_id = front_proxy_id
        self.plans: dict[int, GrantedPlan] = {}


class SchedulerCore:
    """Feed it events with a time that never goes back, and do what the actions say, in order."""

    def __init__(
        self,
        config: SchedulerConfig,
        rng: Random | None = None,
        probe: Probe | None = None,
        *,
        began_s: float = float("-inf"),
    ) -> None:
        """``began_s``: when this scheduler took over; for ``rebuild_grace_s`` from then it knows not everything."""
        self.rebuilding = began_s + config.rebuild_grace_s > began_s
        self._rebuilt_at_s = began_s + config.rebuild_grace_s
        self.cluster = ClusterState()
        self.fronts: dict[int, Front] = {}
        self.plans_in_flight = 0
        self._config = config
        self._planner = Planner(config, rng, probe)
        self._admission = Admission(
            plans_in_flight_max=config.plans_in_flight_max,
            retry_after_min_s=config.retry_after_min_s,
            retry_after_max_s=config.retry_after_max_s,
            release_window_s=config.release_window_s,
        )
        self._story: deque[tuple[float, Event]] = deque(maxlen=STORY_EVENTS_MAX)

    def handle(self, event: Event, now_s: float) -> Sequence[Action]:
        """What follows from one event."""
        if not isinstance(event, UNTOLD):
            self._story.append((now_s, event))
        match event:
            case PlanRequested():
                return (self._plan(event, now_s),)
            case RequestEnded(session=session, plan_id=plan_id):
                self._end((session, plan_id), now_s)
                return ()
            case PlansRunning():
                self._reconcile(event, now_s)
                return ()
            case WorkerLoadReported():
                return self._report(event, now_s)
            case Tick():
                return self._tick(now_s)
            case WorkerJoined(session=session, facts=facts):
                return self._join(session, facts, now_s)
            case WorkerLeft(session=session, worker_id=worker_id):
                return self._leave(session, worker_id)
            case WorkerSuspected(worker_id=worker_id, epoch=epoch):
                self._suspect(worker_id, epoch, now_s)
                return ()
            case DrainRequested(worker_id=worker_id, deadline_s=deadline_s):
                return self._drain(worker_id, deadline_s)
            case FrontJoined(session=session, front_proxy_id=front_proxy_id):
                assert session not in self.fronts, session
                self.fronts[session] = Front(front_proxy_id)
                return (PublishView(at_once=True),)
            case FrontLeft(session=session):
                self._front_leave(session, now_s)
                return ()
            case _:
                assert_never(event)

    def _front_leave(self, session: int, now_s: float) -> None:
        for plan_id in list(self.fronts[session].plans):
            self._end((session, plan_id), now_s)
        del self.fronts[session]

    def _leave(self, session: int, worker_id: str) -> Sequence[Action]:
        worker = self._member(worker_id, session)
        if worker is None:
            return ()
        self.cluster.remove(worker_id)
        return (PublishView(at_once=True),)

    def _suspect(self, worker_id: str, epoch: int, now_s: float) -> None:
        worker = self.cluster.get(worker_id)
        if worker is not None and worker.facts.epoch == epoch:
            worker.suspect_until_s = now_s + self._config.suspect_cooldown_s

    def _join(self, session: int, facts: WorkerFacts, now_s: float) -> Sequence[Action]:
        problem = self._objection(facts)
        if problem is not None:
            return (RejectWorker(session=session, failure=Failure(kind=FailureKind.INCOMPATIBLE, message=problem)),)
        actions: list[Action] = []
        former = self.cluster.get(facts.worker_id)
        if former is not None and former.facts.epoch == facts.epoch:
            # The same engine on a new stream: what it holds is still there, and so are its reservations.
            actions.append(DropWorker(session=former.session, worker_id=facts.worker_id, reason="reconnected"))
            former.session, former.heard_s = session, now_s
        else:
            if former is not None:
                actions.append(DropWorker(session=former.session, worker_id=facts.worker_id, reason="replaced"))
                self.cluster.remove(former.worker_id)
            self._add(Worker(facts, session, now_s, self._config.prefill_initial_tokens_per_s))
        actions.append(AcceptWorker(session=session, worker_id=facts.worker_id))
        actions.append(PublishView(at_once=True))
        return actions

    def _add(self, worker: Worker) -> None:
        """A new member. Plans that name this very incarnation go on: only its stream was away."""
        self.cluster.add(worker)
        if self.rebuilding:
            worker.take_care(-(-self._config.output_reserve_tokens // worker.block_size_tokens))
        for session, front in self.fronts.items():
            for plan_id, plan in front.plans.items():
                if plan.decode == worker.placement:
                    worker.adopt((session, plan_id), plan.decode_blocks)

    def _reconcile(self, event: PlansRunning, now_s: float) -> None:
        front = self.fronts[event.session]
        for plan in event.plans:
            if plan.plan_id not in front.plans and self._admission.has_room(self.plans_in_flight):
                self._adopt(event.session, front, plan)
        if event.complete:
            named = event.asked.union(plan.plan_id for plan in event.plans)
            for plan_id in [plan_id for plan_id in front.plans if plan_id not in named]:
                self._end((event.session, plan_id), now_s)

    def _adopt(self, session: int, front: Front, plan: RunningPlan) -> None:
        """Take over a plan that somebody else made. Its worker may register later."""
        front.plans[plan.plan_id] = GrantedPlan(plan.request_id, plan.prefill, plan.decode, plan.decode_blocks)
        self.plans_in_flight += 1
        worker = self._member_of(plan.decode)
        if worker is not None:
            worker.adopt((session, plan.plan_id), plan.decode_blocks)

    def _objection(self, facts: WorkerFacts) -> str | None:
        """Why a worker may not join, as a sentence; None when it may."""
        name = facts.worker_id
        if not name or facts.epoch <= 0 or facts.block_size_tokens <= 0 or facts.kv_blocks_total <= 0:
            return f"Worker {name!r} must state its id, epoch, block size and number of KV blocks."
        former = self.cluster.get(name)
        if former is not None and former.facts.epoch > facts.epoch:
            return f"A newer start of worker {name} is registered; every worker needs a worker_id of its own."
        if former is not None and former.facts.epoch == facts.epoch and former.facts != facts:
            return f"Worker {name} changed its facts without a new epoch."
        if former is None and len(self.cluster.workers) >= self._config.workers_max:
            return f"The scheduler accepts at most {self._config.workers_max} workers (scheduler.workers_max)."
        # All members agree with one another, so any one of them speaks for the cluster.
        member = next(iter(self.cluster.others(name)), None)
        if member is None:
            return None
        for what, own, theirs in (
            ("engine version", facts.engine_version, member.facts.engine_version),
            ("model", facts.model, member.facts.model),
            ("KV layout", facts.layout_fingerprint, member.facts.layout_fingerprint),
        ):
            if own != theirs:
                return f"Worker {name} has {what} {own!r}, but {member.worker_id} is registered with {theirs!r}."
        return None

    def _member(self, worker_id: str, session: int) -> Worker | None:
        """The worker if this stream is its present one."""
        worker = self.cluster.get(worker_id)
        return worker if worker is not None and worker.session == session else None

    def _report(self, event: WorkerLoadReported, now_s: float) -> Sequence[Action]:
        worker = self._member(event.worker_id, event.session)
        if worker is None:
            return ()
        if worker.load == event.load:
            worker.report(event.load, now_s, self._config.plan_visible_after_s)
            return ()
        changed_state = worker.load.state is not event.load.state
        if changed_state:
            self._story.append((now_s, event))
        worker.report(event.load, now_s, self._config.plan_visible_after_s)
        return (PublishView(at_once=changed_state),)

    def _tick(self, now_s: float) -> Sequence[Action]:
        silent = [
            worker for worker in self.cluster.workers.values() if worker.heard_s + self._config.worker_lease_s <= now_s
        ]
        rebuilt = self.rebuilding and self._rebuilt_at_s <= now_s
        if rebuilt:
            self.rebuilding = False
            for worker in self.cluster.workers.values():
                worker.take_care(0)
        if not silent and not rebuilt:
            return ()
        actions: list[Action] = []
        for worker in silent:
            self.cluster.remove(worker.worker_id)
            actions.append(DropWorker(session=worker.session, worker_id=worker.worker_id, reason="silent"))
        return (*actions, PublishView(at_once=True))

    def _drain(self, worker_id: str, deadline_s: float) -> Sequence[Action]:
        worker = self.cluster.get(worker_id)
        if worker is None or worker.drain_asked:
            return ()
        worker.drain()
        return (
            DrainWorker(session=worker.session, worker_id=worker_id, deadline_s=deadline_s),
            PublishView(at_once=True),
        )

    def _plan(self, event: PlanRequested, now_s: float) -> ReplyPlan | ReplyRefusal:
        front = self.fronts[event.session]
        if event.plan_id in front.plans:
            verdict: Chosen | NotPlaced = NotPlaced(cause="plan_id_in_use", message="The plan_id is in use.")
        elif not self._admission.has_room(self.plans_in_flight):
            limit = self._config.plans_in_flight_max
            verdict = NotPlaced(
                cause="plans_in_flight", message=f"{limit} requests are in flight, the configured most."
            )
        else:
            verdict = self._planner.place(event, self.cluster, now_s)
        match verdict:
            case Chosen():
                return self._grant(event, front, verdict, now_s)
            case NotPlaced():
                return self._refuse(event, verdict, now_s)
            case _:
                assert_never(verdict)

    def _grant(self, event: PlanRequested, front: Front, chosen: Chosen, now_s: float) -> ReplyPlan:
        key = (event.session, event.plan_id)
        prefill, decode = chosen.prefill, chosen.decode
        computing = prefill or decode
        assert computing is not None
        if decode is not None:
            decode.reserve(key, chosen.decode_blocks)
        # A pinned sibling finds its prompt's KV in place and computes next to nothing.
        if chosen.reason is not Reason.PINNED:
            computing.assign_prefill(key, event.prompt_tokens, now_s)
        at_prefill = prefill.placement if prefill is not None else None
        at_decode = decode.placement if decode is not None else None
        front.plans[event.plan_id] = GrantedPlan(event.request_id, at_prefill, at_decode, chosen.decode_blocks)
        self.plans_in_flight += 1
        return ReplyPlan(
            session=event.session,
            plan_id=event.plan_id,
            prefill=at_prefill,
            decode=at_decode,
            decode_blocks_reserved=chosen.decode_blocks,
            reason=chosen.reason.value,
        )

    def _refuse(self, event: PlanRequested, verdict: NotPlaced, now_s: float) -> ReplyRefusal:
        kind = _KIND[verdict.cause]
        retry_after_s = None
        if kind is FailureKind.EXHAUSTED:
            retry_after_s = self._admission.retry_after_s(max(1, verdict.missing_blocks), now_s)
        elif kind is FailureKind.UNAVAILABLE:
            retry_after_s = self._config.retry_after_min_s
        failure = Failure(kind=kind, message=verdict.message, retry_after_s=retry_after_s)
        return ReplyRefusal(session=event.session, plan_id=event.plan_id, failure=failure, cause=verdict.cause)

    def _end(self, key: PlanKey, now_s: float) -> None:
        front = self.fronts.get(key[0])
        plan = front.plans.pop(key[1], None) if front is not None else None
        if plan is None:
            return
        self.plans_in_flight -= 1
        freed = 0
        for placed in (plan.prefill, plan.decode):
            worker = self._member_of(placed)
            if worker is not None:
                freed += worker.forget(key)
        if freed:
            self._admission.released(freed, now_s)

    def _member_of(self, placed: Placement | None) -> Worker | None:
        """The worker of a plan, if that incarnation is a member now."""
        worker = self.cluster.get(placed.worker_id) if placed is not None else None
        return worker if worker is not None and worker.placement == placed else None

    def story(self) -> Sequence[str]:
        """The last telling events, oldest first: for error messages."""
        return [f"{at_s:.3f} {event}" for at_s, event in self._story]

    def check(self) -> None:
        """Assert every invariant of the books. Slow: for tests and after a failure."""
        self.cluster.check()
        assert self.plans_in_flight == sum(len(front.plans) for front in self.fronts.values())
        assert self.plans_in_flight <= self._config.plans_in_flight_max
        for worker in self.cluster.workers.values():
            for session, plan_id in worker.reserved:
                assert self.fronts[session].plans[plan_id].decode == worker.placement, (worker.worker_id, plan_id)
            for session, plan_id in worker.unreported:
                plan = self.fronts[session].plans[plan_id]
                assert worker.placement == (plan.prefill or plan.decode), (worker.worker_id, plan_id)
        for session, front in self.fronts.items():
            for plan_id, plan in front.plans.items():
                decode = self._member_of(plan.decode)
                assert decode is None or (session, plan_id) in decode.reserved, (session, plan_id)
