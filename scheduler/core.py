"""The scheduler's decisions: events in, actions out. No clock, no I/O; chance only through an argument.

Holds the membership of workers and what is known of their health. ``queueing`` has the other parts: reservations, the
queue, and which request is placed next. ``check`` asserts the invariants of all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import assert_never

from runtime.failures import Failure, FailureKind
from runtime.priority_class import PriorityClass
from runtime.roles import WorkerRole
from scheduler.api.actions import (
    AcceptWorker,
    Action,
    AskBlockSnapshot,
    DrainWorker,
    DropWorker,
    EjectWorker,
    PublishView,
    RejectWorker,
)
from scheduler.api.chance import Random
from scheduler.api.events import (
    DrainRequested,
    Event,
    FlipRequested,
    FrontJoined,
    FrontLeft,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    Tick,
    WorkerBlocksReported,
    WorkerJoined,
    WorkerLeasesReported,
    WorkerLeft,
    WorkerLoadReported,
    WorkerProgressReported,
    WorkerSuspected,
)
from scheduler.api.worker_info import WorkerInfo
from scheduler.cluster.latency_profile import ASSUMED, LatencyProfile
from scheduler.cluster.lease_audit import LeaseAuditor
from scheduler.cluster.membership import is_isolated, objection
from scheduler.cluster.outlier_detector import Standing, WorkerHealth
from scheduler.cluster.state import ClusterState
from scheduler.cluster.worker import Worker
from scheduler.cluster.worker_group import joined
from scheduler.config import SchedulerConfig, SchedulerParameters
from scheduler.queueing.admission import AdmissionController
from scheduler.queueing.refusals import Refusals
from scheduler.queueing.reservations import FrontProxySession, Reservations
from scheduler.queueing.wait_queue import WaitQueue
from scheduler.routing.placement import Planner
from scheduler.routing.prefixes import Prefixes
from scheduler.scaling.demand import Traffic
from scheduler.scaling.live import LivePlanner
from scheduler.scaling.role_flips import RoleFlips

EVENT_LOG_MAX = 64

# So frequent that they would push everything else out of the log of events.
NOT_LOGGED = frozenset(
    {
        PlansRunning,
        RequestEnded,
        Tick,
        WorkerLeasesReported,
    }
)


_AboutWorker = WorkerLeft | WorkerSuspected | DrainRequested | FlipRequested | WorkerLeasesReported


_AT_ONCE, _LATER = (PublishView(at_once=True),), (PublishView(at_once=False),)


class SchedulerCore:
    """Feed it events with a time that never goes back, and do what the actions say, in order."""

    def __init__(
        self,
        config: SchedulerConfig,
        rng: Random | None = None,
        *,
        began_s: float = float("-inf"),
        profile: LatencyProfile = ASSUMED,
        make_planner: type[Planner] = Planner,
    ) -> None:
        """``began_s``: when this scheduler took over; until ``recovery_grace_s`` later it may not know all plans.

        ``make_planner``: a benchmark compares with planners that choose otherwise.
        """
        config = SchedulerParameters.of(config)
        self.recovering = began_s + config.recovery_grace_s > began_s
        self._recovered_at_s = began_s + config.recovery_grace_s
        self.cluster = ClusterState(profile)
        self._config = config
        self._profile = profile
        self.prefixes = Prefixes(blocks_max=config.indexed_blocks_max)
        self._reservations = Reservations(self.cluster, config.plans_in_flight_max)
        self._queue = WaitQueue(config)
        self._admission = AdmissionController(
            config,
            make_planner(config, rng, self.prefixes, self.cluster.lengths),
            self.prefixes,
            self.cluster,
            self._reservations,
            self._queue,
            Refusals(self._queue, rng),
        )
        self._lease_auditor = LeaseAuditor(config.leak_after_s)
        self.flips = RoleFlips(config.flip_timeout_s, config.flip_answer_s, config.workers_max)
        self.live_planner = LivePlanner(config.scaling, config.scaling_interval_s)
        self._audited_s = self._isolated_s = float("-inf")
        # The last incarnation of each worker that left.
        self._departed: dict[str, Worker] = {}
        self._event_log: deque[tuple[float, Event]] = deque(maxlen=EVENT_LOG_MAX)

    @property
    def plans_in_flight(self) -> int:
        """Plans granted and not ended, over all front proxies."""
        return self._reservations.plans_in_flight

    @property
    def fronts(self) -> Mapping[int, FrontProxySession]:
        """Front proxies' streams, by session."""
        return self._reservations.fronts

    def handle(self, event: Event, now_s: float) -> Sequence[Action]:
        """What follows from one event."""
        # The most frequent ones first.
        if isinstance(event, WorkerLoadReported):
            return self._report(event, now_s)
        if isinstance(event, WorkerProgressReported):
            return self._learn(event)
        if isinstance(event, WorkerBlocksReported):
            return self._hear_blocks(event, now_s)
        if type(event) not in NOT_LOGGED:
            self._event_log.append((now_s, event))
        match event:
            case PlanRequested():
                self.live_planner.asked(event.itl_slo_s)
                return self._admission.ask(event, now_s, recovering=self.recovering)
            case RequestEnded():
                self._end(event, now_s)
                return self._serve(now_s)
            case PlansRunning():
                return (*self._reconcile(event, now_s), *self._serve(now_s))
            case Tick(late_s=late_s):
                if late_s:
                    self.cluster.forgive(late_s, now_s)
                overdue = self._admission.overdue(now_s)
                self._queue.bring_back(now_s)
                self.prefixes.tick(now_s)
                return (*self._tick(now_s), *self._scale(now_s), *self._audit(now_s), *overdue, *self._serve(now_s))
            case WorkerJoined(session=session, info=info):
                self._end_isolation(now_s)
                return self._join(session, info, now_s)
            case WorkerLeft() | WorkerSuspected() | DrainRequested() | FlipRequested() | WorkerLeasesReported():
                return self._hear(event, now_s)
            case FrontJoined():
                return self._front_join(event, now_s)
            case FrontLeft(session=session):
                self._front_leave(session, now_s)
                return self._serve(now_s)
            case _:
                assert_never(event)

    def _hear(self, event: _AboutWorker, now_s: float) -> Sequence[Action]:
        """Handle what is said about one worker and places no request."""
        match event:
            case WorkerLeft(session=session, worker_id=worker_id):
                return self._leave(session, worker_id, now_s)
            case WorkerSuspected():
                return self._suspect(event, now_s)
            case DrainRequested(worker_id=worker_id):
                return self._drain(worker_id)
            case FlipRequested(worker_id=worker_id, role=role):
                return self._flip(worker_id, role, now_s)
            case WorkerLeasesReported(session=session, worker_id=worker_id, lease_ids=lease_ids):
                worker = self._member(worker_id, session)
                if worker is not None:
                    worker.lease_ids = lease_ids
                return ()
            case _:
                assert_never(event)

    def _end(self, event: RequestEnded, now_s: float) -> None:
        key, finished = (event.session, event.plan_id), event.outcome == "finished"
        self._queue.remove(key, now_s)
        charge = self._reservations.end(key, now_s, finished=finished)
        if charge is not None:
            self._queue.correct(charge, event.output_tokens, event.cached_tokens)
            if finished:
                self.cluster.lengths.learn(event.output_tokens)

    def _learn(self, event: WorkerProgressReported) -> Sequence[Action]:
        worker = self.cluster.get(event.worker_id)
        if worker is not None and worker.session == event.session:
            worker.latency.learn(event.steps)
        return ()

    def _hear_blocks(self, event: WorkerBlocksReported, now_s: float) -> Sequence[Action]:
        worker_id, delta = event.worker_id, event.delta
        worker = self._member(worker_id, event.session)
        if worker is None or delta.rank >= len(worker.ranks):
            return ()
        if not self.prefixes.told(worker.ranks[delta.rank], delta, now_s):
            return ()
        return (AskBlockSnapshot(session=event.session, worker_id=worker_id, rank=delta.rank),)

    def _end_isolation(self, now_s: float) -> None:
        """All peers were gone and one returns. As after a start, peers know plans that this scheduler does not."""
        if self._departed and not self.fronts and not self.cluster.workers:
            self._doubt(now_s)

    def _doubt(self, now_s: float) -> None:
        """Peers may know plans that are not known here: recover as after a start, at least for ``worker_lease_s``."""
        self._recovered_at_s = now_s + max(self._config.recovery_grace_s, self._config.worker_lease_s)
        self.recovering = self._config.recovery_grace_s > 0

    def _front_join(self, event: FrontJoined, now_s: float) -> Sequence[Action]:
        self._end_isolation(now_s)
        self._reservations.join(event.session, event.front_proxy_id, event.incarnation)
        return (PublishView(at_once=True),)

    def _front_leave(self, session: int, now_s: float) -> None:
        self._reservations.leave(session, now_s)
        self._forget_waiting(session, now_s)

    def _forget_waiting(self, session: int, now_s: float) -> None:
        for key in self._queue.of_session(session):
            self._queue.remove(key, now_s)

    def _replace_former(self, session: int, now_s: float) -> bool:
        """What a front proxy reports on its newest stream replaces what its older streams reported.

        The old stream may still look open here. False: ``session`` is itself an old stream.
        """
        others = self._reservations.streams_of_same(session)
        if any(other > session for other in others):
            return False
        for former in others:
            self._reservations.end_all(former, now_s)
            self._forget_waiting(former, now_s)
        return True

    def _leave(self, session: int, worker_id: str, now_s: float) -> Sequence[Action]:
        worker = self._member(worker_id, session)
        if worker is None:
            return ()
        self._remove(worker)
        if worker.role == "decode":
            self.cluster.decode_left_s = now_s
        return (PublishView(at_once=True),)

    def _remove(self, worker: Worker) -> None:
        """A member is gone. Its health record is kept: the same engine may return."""
        self.cluster.remove(worker.worker_id)
        self.prefixes.left(worker)
        self._lease_auditor.forget(worker.worker_id)
        self._departed[worker.worker_id] = worker
        if len(self._departed) > self._config.workers_max:
            del self._departed[next(iter(self._departed))]

    def _suspect(self, event: WorkerSuspected, now_s: float) -> Sequence[Action]:
        worker = self.cluster.get(event.worker_id)
        if worker is None or worker.info.epoch != event.epoch:
            return ()
        for rank in worker.ranks:
            rank.suspect_until_s = now_s + self._config.suspect_cooldown_s
        if not worker.health.failed(now_s) or not self._may_eject(worker):
            return ()
        for_s = worker.health.eject(now_s)
        worker.judge()
        return (EjectWorker(worker_id=worker.worker_id, for_s=for_s), PublishView(at_once=True))

    def _may_eject(self, worker: Worker) -> bool:
        """Most of a pool must stay: when all of it fails, the fault is elsewhere."""
        pool = self.cluster.pool_of(worker).with_role(worker.role)
        out = sum(other.member is worker or other.health.standing is not Standing.IN_SERVICE for other in pool)
        return out <= self._config.outliers.ejected_fraction_max * len(pool)

    def _join(self, session: int, info: WorkerInfo, now_s: float) -> Sequence[Action]:
        problem = objection(info, self.cluster, self._config.workers_max)
        if problem is not None:
            return (RejectWorker(session=session, failure=Failure(kind=FailureKind.INCOMPATIBLE, message=problem)),)
        actions: list[Action] = []
        former = self.cluster.get(info.worker_id)
        known = former or self._departed.get(info.worker_id)
        anew = known is not None and known.info.epoch == info.epoch and known.info.registration < info.registration
        # On its own stream: the answer to a change of role that it did not finish in time.
        kept_role = former is not None and former.session == session and former.info == info
        if former is not None and former.session != session:
            reason = "reconnected" if former.info.epoch == info.epoch else "replaced"
            actions.append(DropWorker(session=former.session, worker_id=info.worker_id, reason=reason))
        if former is not None and former.info == info:
            # The same engine on a new stream: what it holds is still there, and so are its reservations.
            former.session, former.heard_s = session, now_s
        elif former is not None and anew:
            self._change_role(former, info, session, now_s)
        else:
            if former is not None:
                self.cluster.remove(former.worker_id)
                self.prefixes.left(former)
            self._add(self._arrived(info, session, now_s))
        member = self.cluster.workers[info.worker_id]
        self.prefixes.joined(member)
        actions.append(AcceptWorker(session=session, worker_id=info.worker_id))
        if member.drain_asked:
            # Its former stream may have ended before it was told.
            actions.append(DrainWorker(session=session, worker_id=info.worker_id))
        if anew or kept_role:
            self.live_planner.ended(info.worker_id, now_s, done=anew)
        actions.extend(self.flips.joined(member, self.cluster.workers.values(), now_s, ended=anew or kept_role))
        actions.append(PublishView(at_once=True))
        return actions

    def _change_role(self, former: Worker, info: WorkerInfo, session: int, now_s: float) -> None:
        """The same engine, perhaps in the other role: it keeps its speed, its health and what its cache holds.

        What was planned there goes on and reserves nothing, as plans name the former registration.
        """
        self.cluster.remove(former.worker_id)
        self.cluster.add(joined(info, session, now_s, former.latency, self._profile, former.health))

    def _arrived(self, info: WorkerInfo, session: int, now_s: float) -> Worker:
        """A new member. If the same engine returns, its health record is kept and an ordered drain still holds."""
        departed = self._departed.pop(info.worker_id, None)
        same = departed is not None and departed.info.epoch == info.epoch
        health = departed.health if departed is not None and same else WorkerHealth(self._config.outliers)
        worker = joined(info, session, now_s, self.cluster.latency_of(info), self._profile, health)
        if departed is not None and same and departed.drain_asked:
            worker.drain()
        return worker

    def _add(self, worker: Worker) -> None:
        """A new member. Plans that name this very incarnation go on: only its stream was away."""
        self.cluster.add(worker)
        if self.recovering:
            worker.reserve_for_recovery(-(-self._config.output_reserve_tokens // worker.block_size_tokens))
        self._reservations.returned(worker)

    def _reconcile(self, event: PlansRunning, now_s: float) -> Sequence[Action]:
        if not self._replace_former(event.session, now_s):
            return ()
        for plan in event.plans:
            # The front proxy lost patience and planned the request itself, so the request leaves the queue.
            self._queue.remove((event.session, plan.plan_id), now_s)
        self._reservations.take_over(event.session, event.plans, now_s)
        if not event.complete:
            return ()
        named = event.asked.union(plan.plan_id for plan in event.plans)
        for key in self._queue.of_session(event.session):
            if key[1] not in named:
                self._queue.remove(key, now_s)
        return self._reservations.drop_unnamed(event.session, named, now_s)

    def _audit(self, now_s: float) -> Sequence[Action]:
        """Compare reservations with the workers that are busy, and leases with the requests that run."""
        if now_s < self._audited_s + self._config.ledger_interval_s:
            return ()
        self._audited_s = now_s
        idle = {
            rank.placement
            for worker in self.cluster.workers.values()
            for rank in worker.ranks
            if worker.idle_since_s is not None and worker.idle_since_s + self._config.leak_after_s <= now_s
        }
        actions: list[Action] = []
        actions.extend(self._reservations.drop_idle(idle, self._config.leak_after_s, now_s))
        running = self._queue.request_ids() | self._reservations.request_ids()
        if self.recovering:
            return actions
        for worker in self.cluster.workers.values():
            actions.extend(self._lease_auditor.look(worker.worker_id, worker.lease_ids, running, now_s))
        return actions

    def leaked_leases(self) -> Mapping[str, int]:
        """Leases held for requests that no front proxy runs, by worker."""
        return self._lease_auditor.leaked()

    def _member(self, worker_id: str, session: int) -> Worker | None:
        """The worker if this stream is its present one."""
        worker = self.cluster.get(worker_id)
        return worker if worker is not None and worker.session == session else None

    def _report(self, event: WorkerLoadReported, now_s: float) -> Sequence[Action]:
        worker = self._member(event.worker_id, event.session)
        if worker is None:
            return self._serve(now_s)
        if worker.load == event.load and not worker.silent:
            worker.report(event.load, now_s, self._config.plan_visible_after_s)
            return self._serve(now_s)
        changed_state = worker.load.state is not event.load.state or worker.silent
        if changed_state:
            self._event_log.append((now_s, event))
            self._queue.bring_back(now_s)
        worker.report(event.load, now_s, self._config.plan_visible_after_s)
        told = _AT_ONCE if changed_state else _LATER
        return (*told, *self._serve(now_s)) if self._queue else told

    def _scale(self, now_s: float) -> Sequence[Action]:
        """Change roles where the planner wants it and may; count how many workers each role should have."""
        if now_s < self.live_planner.next_s and not self._queue:
            return ()
        books = self._reservations
        traffic = Traffic(
            granted=books.granted,
            prompts_s=books.prompts_s,
            in_flight=books.plans_in_flight,
            waiting=len(self._queue),
            front_proxies=len(books.fronts),
            short_of=self._admission.short_of,
            itl_refused=self._admission.itl_refused,
        )
        flips = self.live_planner.look(list(self.cluster.workers.values()), traffic, self.cluster.start_s, now_s)
        return [action for flip in flips for action in self._flip(flip.worker_id, flip.role, now_s)]

    def _tick(self, now_s: float) -> Sequence[Action]:
        if is_isolated(self.cluster):
            self._isolated_s = now_s
            # After a cut the peers first find their streams broken and only then reconnect, so wait from now.
            self._doubt(now_s)
        heard_by_s = now_s - self._config.worker_lease_s
        silent = [one for one in self.cluster.workers.values() if one.heard_s <= heard_by_s >= self._isolated_s]
        recovered = self.recovering and self._recovered_at_s <= now_s
        if recovered:
            self.recovering = False
            for worker in self.cluster.workers.values():
                worker.reserve_for_recovery(0)
        given_up = [member for name in self.flips.overdue(now_s) if (member := self.cluster.get(name)) is not None]
        for worker in given_up:
            worker.flip(going_on=False)
        changed = self.cluster.look(self._config.silence_timeout_s, now_s)
        if not changed and not silent and not recovered and not given_up:
            return ()
        actions: list[Action] = []
        for worker in silent:
            self._remove(worker)
            actions.append(DropWorker(session=worker.session, worker_id=worker.worker_id, reason="silent"))
        return (*actions, PublishView(at_once=True))

    def _drain(self, worker_id: str) -> Sequence[Action]:
        worker = self.cluster.get(worker_id)
        if worker is None or worker.drain_asked:
            return ()
        worker.drain()
        return (DrainWorker(session=worker.session, worker_id=worker_id), PublishView(at_once=True))

    def flip_objection(self, worker_id: str, role: WorkerRole) -> str | None:
        """Why a registered worker must not take a role now; None when it may, or has it."""
        workers = self.cluster.workers
        return self.flips.objection(workers[worker_id], role, workers.values())

    def _flip(self, worker_id: str, role: WorkerRole, now_s: float) -> Sequence[Action]:
        worker = self.cluster.get(worker_id)
        if worker is None or self.flip_objection(worker_id, role) is not None:
            return ()
        return (*self.flips.begin(worker, role, now_s), PublishView(at_once=True))

    def _serve(self, now_s: float) -> Sequence[Action]:
        return self._admission.serve(now_s, recovering=self.recovering)

    def share(self, weights: Mapping[str, float]) -> None:
        """Tenants share by these weights from now on; others have 1."""
        self._queue.weights = weights

    def waiting(self) -> Mapping[PriorityClass, int]:
        """How many requests wait for a place, by class."""
        return self._queue.counts()

    def queued_prompt_tokens(self) -> int:
        """Prompt tokens that wait for a place, or for the engine of their worker."""
        at_workers = sum(worker.load.prefill_tokens_queued for worker in self.cluster.workers.values())
        return self._queue.prompt_tokens + at_workers

    def event_log(self) -> Sequence[str]:
        """The last telling events, oldest first: for error messages."""
        return [f"{at_s:.3f} {event}" for at_s, event in self._event_log]

    def check(self) -> None:
        """Assert every invariant. Slow: for tests and after a failure."""
        self.cluster.check()
        self._queue.check()
        for session, plan_id in self._queue:
            assert plan_id not in self.fronts[session].plans, (session, plan_id)
        self._reservations.check()
        assert self.plans_in_flight <= self._config.plans_in_flight_max
