"""Scheduler processes in virtual time: the production core and lease, behind streams. Decides nothing itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from front_proxy.planning.cluster_view import WorkerEntry
from front_proxy.planning.events import ViewShown
from scheduler.api.actions import AcceptWorker, Action, DropWorker, RejectWorker, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import (
    Event,
    FrontJoined,
    FrontLeft,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    Tick,
    WorkerJoined,
    WorkerLeft,
    WorkerLoadReported,
    WorkerSuspected,
)
from scheduler.api.worker_info import WorkerLoad
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from scheduler.leadership.rules import LOOKS_PER_TERM
from simulation.faults import checkers
from simulation.faults.fronts import SimFront
from simulation.faults.lease_store import LeaseStore, SimLease
from simulation.faults.scheduler_connection import Dial
from simulation.kernel.network import DOWN, UP, Process, Stream
from simulation.kernel.world import World

if TYPE_CHECKING:
    from simulation.faults.cluster import SimCluster

# How often it looks at its leases and shows the cluster.
TICK_S = 0.25


class _Session(msgspec.Struct, frozen=True):
    """One stream, its number and who is at the other end: a worker by its dial, or a front proxy."""

    number: int
    peer: Dial | SimFront
    stream: Stream


class SimScheduler(Process):
    """One scheduler process over all its incarnations: a core, a lease and streams."""

    def __init__(
        self, world: World, name: str, cluster: SimCluster, config: SchedulerConfig, store: LeaseStore | None,
        core: type[SchedulerCore],
    ) -> None:  # fmt: skip
        super().__init__(world, name)
        self.config = config
        self.core = core(config, world.rng)
        self.epoch = 0
        self.leads_until_s = float("inf")
        self.stands_by = False
        self.on_stepped_down: Callable[[], None] = lambda: None
        """Told when it has ended itself since it leads no more."""
        self._cluster = cluster
        self._store = store
        self._make_core = core
        self._lease: SimLease | None = None
        self.heard_s: dict[str, float] = {}
        """When each worker last said what it does."""
        self._numbers = itertools.count(1)
        self._sessions: dict[int, _Session] = {}
        self.incarnation = 0
        self._begin()
        if store is not None:
            self._try_to_lead()

    @property
    def leads(self) -> bool:
        """Whether it may decide."""
        return self.alive and not self.stands_by and self.world.now_s < self.leads_until_s

    @property
    def deposed(self) -> bool:
        """Whether its time is over, as production looks at it before it decides anything."""
        return self.world.now_s >= self.leads_until_s

    def start(self) -> None:
        """A new incarnation that knows nobody."""
        self.alive = True
        self.frozen_until_s = 0.0
        self.world.tell(self.name, "starts again")
        self.core = self._make_core(self.config, self.world.rng, began_s=self.world.now_s)
        self._begin()

    def crash(self) -> None:
        """Forget everything."""
        if not self.alive:
            return
        self.world.tell(self.name, "ends")
        self.alive = False
        self.core.check()
        self._sessions.clear()
        self.cut_streams()

    def view(self) -> ViewShown:
        """What front proxies are shown of the cluster."""
        return ViewShown(
            [
                WorkerEntry(worker.info, msgspec.structs.replace(worker.load, state=worker.state), worker.unusable)
                for worker in self.core.cluster.workers.values()
            ],
            recovering=self.core.recovering,
        )

    # Time and the lead

    def _begin(self) -> None:
        self.incarnation += 1
        self.after(TICK_S, self._tick, self.incarnation, self.world.now_s + TICK_S)
        if self._store is not None:
            self._lease = SimLease(self._store, self._cluster.settings.lease_s)
            self.stands_by, self.leads_until_s = True, float("-inf")
            self._look_later()

    def _look_later(self) -> None:
        self.after(self._cluster.settings.lease_s / LOOKS_PER_TERM, self._look_at_the_lease, self.incarnation)

    def _tick(self, incarnation: int, due_s: float) -> None:
        if incarnation != self.incarnation or not self.alive:
            return
        if not self.stands_by:
            self._feed(Tick(late_s=max(self.world.now_s - due_s, 0.0)))
            self.core.check()
            self._show_all()
        self.after(TICK_S, self._tick, incarnation, self.world.now_s + TICK_S)

    def _look_at_the_lease(self, incarnation: int) -> None:
        if incarnation != self.incarnation or not self.alive:
            return
        assert self._lease is not None
        if self.stands_by:
            self._try_to_lead()
        elif self._lease.renew(self.world.now_s):
            self.leads_until_s = self._lease.until_s
        else:
            self._step_down()
            return
        self._look_later()

    def _try_to_lead(self) -> None:
        lease, now_s = self._lease, self.world.now_s
        assert lease is not None
        if lease.claim(now_s):
            self.core = self._make_core(self.config, self.world.rng, began_s=now_s)
            self.epoch, self.stands_by, self.leads_until_s = lease.epoch, False, lease.until_s
            self.world.tell(self.name, f"leads, epoch {lease.epoch}")

    def _step_down(self) -> None:
        self.world.tell(self.name, "does not lead any more")
        self.crash()
        self.on_stepped_down()

    # Streams

    def on_worker(self, dial: Dial, stream: Stream) -> None:
        """A worker registers, if there is anybody to hear it."""
        if self._refuses():
            stream.send(DOWN, dial.on_refused, stream)
            return
        session = self._begin_session(dial, stream)
        self._feed(WorkerJoined(session=session.number, info=dial.process.worker_info()))

    def on_front(self, front: SimFront, stream: Stream) -> None:
        """A front proxy registers, if there is anybody to hear it."""
        if self._refuses():
            stream.send(DOWN, front.plans.on_refused, stream)
            return
        session = self._begin_session(front, stream)
        self._feed(FrontJoined(session=session.number, front_proxy_id=front.name))
        stream.send(DOWN, front.plans.numbered, stream, session.number)
        stream.send(DOWN, front.plans.see, self.view(), self.epoch)

    def _refuses(self) -> bool:
        return self.stands_by or self.deposed

    def _begin_session(self, peer: Dial | SimFront, stream: Stream) -> _Session:
        session = _Session(next(self._numbers), peer, stream)
        self._sessions[session.number] = session
        return session

    def on_lost(self, stream: Stream) -> None:
        """A stream is over."""
        session = next((each for each in self._sessions.values() if each.stream is stream), None)
        if session is not None and self.alive:
            del self._sessions[session.number]
            self._left(session, "lost")

    def _left(self, session: _Session, reason: str) -> None:
        if isinstance(session.peer, SimFront):
            self._feed(FrontLeft(session=session.number))
        else:
            name = session.peer.process.name
            self._feed(WorkerLeft(session=session.number, worker_id=name, reason=reason))

    def _show_all(self) -> None:
        if not self._sessions:
            return
        view = self.view()
        for session in list(self._sessions.values()):
            if isinstance(session.peer, SimFront):
                session.stream.send(DOWN, session.peer.plans.see, view, self.epoch)

    def _say(self, session: _Session, dial: Dial, what: Callable[..., None], *arguments: object) -> None:
        session.stream.send(DOWN, dial.on_message, session.stream, self.epoch, what, *arguments)

    # What others say

    def on_plan(self, event: PlanRequested) -> None:
        """A question arrived."""
        self._feed(event)

    def on_running(self, event: PlansRunning) -> None:
        """A front proxy says what it runs."""
        self._feed(event)

    def on_ended(self, session: int, plan_id: int, outcome: str, output_tokens: int) -> None:
        """A plan is over."""
        self._feed(RequestEnded(session=session, plan_id=plan_id, outcome=outcome, output_tokens=output_tokens))

    def on_suspect(self, worker_id: str, epoch: int) -> None:
        """Somebody could not use a worker."""
        self._feed(WorkerSuspected(worker_id=worker_id, epoch=epoch, reason="lost"))

    def on_load(self, session: int, worker_id: str, load: WorkerLoad) -> None:
        """A worker says what it does."""
        self.heard_s[worker_id] = self.world.now_s
        self._feed(WorkerLoadReported(session=session, worker_id=worker_id, load=load))

    def on_leaving(self, session: int) -> None:
        """A worker says goodbye."""
        if session in self._sessions:
            self._left(self._sessions[session], "leaving")

    def _feed(self, event: Event) -> None:
        """Let the core handle it, and send the answers to whom they are for."""
        if not self.alive:
            return
        if self.deposed:
            self._step_down()
            return
        if self._store is not None:
            self._cluster.check_who_decides(self)
        for action in self.core.handle(event, self.world.now_s):
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case ReplyPlan() | ReplyRefusal() | ReplyWaiting():
                self._answer(action)
            case AcceptWorker(session=session):
                accepted = self._sessions[session]
                assert isinstance(accepted.peer, Dial)
                self._say(accepted, accepted.peer, accepted.peer.on_opened, self, session)
            case RejectWorker(session=session) | DropWorker(session=session):
                if isinstance(action, DropWorker) and action.reason == "silent":
                    checkers.check_given_up(self, action.worker_id)
                dropped = self._sessions.pop(session, None)
                if dropped is not None:
                    dropped.stream.drop(UP)
                    # As whoever serves a stream says when it has ended, whoever ended it.
                    self.after(0.0, self._left, dropped, "closed")
            case _:
                pass

    def _answer(self, reply: ReplyPlan | ReplyRefusal | ReplyWaiting) -> None:
        session = self._sessions.get(reply.session)
        if session is None:
            return
        assert isinstance(session.peer, SimFront)
        if self.world.rng.random() >= self._cluster.faults.plan_lost:
            session.stream.send(DOWN, session.peer.plans.hear, reply, self.epoch)
