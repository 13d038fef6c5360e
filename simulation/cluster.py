"""One simulated cluster: a production scheduler core, workers and front proxies on one heap of events."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import msgspec

from front_proxy.cluster_view import WorkerEntry
from front_proxy.desk_events import ViewShown
from front_proxy.flow_phase import Phase
from front_proxy.plan_desk import PlanDesk
from front_proxy.request_flow import RequestFlow
from front_proxy.work import Placement, Stage
from scheduler.actions import DropWorker, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.core import SchedulerCore
from scheduler.events import (
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
from scheduler.facts import Role, WorkerFacts, WorkerLoad, WorkerState
from simulation import checkers, faults, front_plans, workload
from simulation.faults import Faults
from simulation.fronts import Client, SimFront
from simulation.policies import REFUSING_CONFIG, SCHEDULER_CONFIG
from simulation.workers import Link, SimWorker
from simulation.world import DOWN, Stream, Violation, World

REQUESTS = 8
# Where failures come one at a time, so that each finds streams to break.
REQUESTS_SINGLE = 16
TICK_S = 0.25
TROUBLE_S = 0.6
# Longer than every deadline, plan timeout and late message together.
SETTLE_S = 3.0
RUN_S_MAX = 30.0
FREEZE_S = (0.1, 2.0)
LONG_FREEZE_S = (2.0, 6.0)
# A supervisor at hand, or one that backs off.
RESTARTS_S = ((0.005, 0.1), (0.1, 1.0))
SCHEDULER_AWAY_S = (0.02, 1.5)
DRAIN_S = (0.0, 0.3)
# From the end of one failure to the next one, where they come one at a time.
RECOVERED_S = 2.0


class SimScheduler:
    """The scheduler process over all its incarnations: a core and its streams."""

    def __init__(self, world: World, cluster: SimCluster, core: type[SchedulerCore]) -> None:
        self._world = world
        self._cluster = cluster
        self._sessions = itertools.count(1)
        self._fronts: dict[int, SimFront] = {}
        self._worker_sessions: dict[str, int] = {}
        self._config = world.rng.choice((SCHEDULER_CONFIG, REFUSING_CONFIG))
        self._core = core
        self.core = core(self._config, world.rng)
        self.up = True

    def connect(self, front: SimFront) -> None:
        """A front proxy opens its stream, if there is anybody to open it to."""
        if not self.up:
            self._world.after(self._cluster.delay_s(), front.plans.on_lost, None, "nobody is there")
            return
        session = next(self._sessions)
        self._fronts[session] = front
        self._feed(FrontJoined(session=session, front_proxy_id=front.name))
        front.plans.connected(self, session, Stream(self._world, self._cluster.delay_s))
        self._show(front)

    def hang_up(self, front: SimFront) -> None:
        """A front proxy ends its stream, or is gone."""
        if front.plans.stream is not None:
            front.plans.stream.cut()
        if self._fronts.pop(front.plans.session, None) is not None:
            self._feed(FrontLeft(session=front.plans.session))

    def on_plan(self, front: SimFront, event: PlanRequested) -> None:
        """A question arrived."""
        assert front.plans.stream is not None
        self._feed(event)

    def on_running(self, event: PlansRunning) -> None:
        """A front proxy says what it runs."""
        self._feed(event)

    def _show(self, front: SimFront) -> None:
        stream = front.plans.stream
        if stream is not None:
            stream.send(DOWN, front.plans.hear, self.view())

    def view(self) -> ViewShown:
        """What front proxies are shown of the cluster."""
        return ViewShown(
            [
                WorkerEntry(worker.facts, msgspec.structs.replace(worker.load, state=worker.state), worker.unusable)
                for worker in self.core.cluster.workers.values()
            ],
            rebuilding=self.core.rebuilding,
        )

    def _feed(self, event: Event) -> None:
        """Let the core handle it, and send the answers to whom they are for."""
        for action in self.core.handle(event, self._world.now_s):
            match action:
                case ReplyPlan() | ReplyRefusal() | ReplyWaiting():
                    self._answer(self._fronts[action.session], action)
                case DropWorker(worker_id=worker_id, reason="silent"):
                    # Its stream is closed, which it learns when it moves again.
                    self._worker_sessions.pop(worker_id, None)
                case _:
                    pass

    def _answer(self, front: SimFront, reply: ReplyPlan | ReplyRefusal | ReplyWaiting) -> None:
        stream = front.plans.stream
        if stream is not None and self._world.rng.random() >= self._cluster.faults.plan_lost:
            stream.send(DOWN, front.plans.hear, front_plans.word(reply))

    def on_ended(self, session: int, plan_id: int, outcome: str, output_tokens: int) -> None:
        """A plan is over."""
        self._feed(RequestEnded(session=session, plan_id=plan_id, outcome=outcome, output_tokens=output_tokens))

    def on_suspect(self, worker_id: str, epoch: int) -> None:
        """Somebody could not use a worker."""
        self._feed(WorkerSuspected(worker_id=worker_id, epoch=epoch, reason="lost"))

    def join(self, worker: SimWorker) -> None:
        """A worker registers."""
        if not self.up or not worker.alive:
            return
        session = self._worker_sessions[worker.worker_id] = next(self._sessions)
        self._feed(WorkerJoined(session=session, facts=_facts(worker)))
        self.report(worker)

    def leave(self, worker_id: str) -> None:
        """A worker's stream broke."""
        session = self._worker_sessions.pop(worker_id, None)
        if session is not None:
            self._feed(WorkerLeft(session=session, worker_id=worker_id, reason="lost"))

    def report(self, worker: SimWorker) -> None:
        """A worker says what it does."""
        session = self._worker_sessions.get(worker.worker_id)
        if not worker.alive or worker.frozen:
            return
        if session is None:
            self.join(worker)
            return
        load = WorkerLoad(
            state=WorkerState.DRAINING if worker.draining else WorkerState.READY,
            requests_running=worker.admission.requests,
            kv_blocks_used=min(worker.admission.blocks + worker.prefill.blocks_held, worker.info.kv_blocks_total),
            leases_held=worker.prefill.leases_held,
        )
        self._feed(WorkerLoadReported(session=session, worker_id=worker.worker_id, load=load))

    def tick(self) -> None:
        """Time passed."""
        if not self.up:
            return
        self._feed(Tick())
        self.core.check()
        for front in self._fronts.values():
            self._show(front)

    def crash(self) -> None:
        """Forget everything."""
        self._world.tell("scheduler", "crashes")
        self.up = False
        self.core.check()
        for front in list(self._fronts.values()):
            stream = front.plans.stream
            if stream is not None:
                stream.cut(functools.partial(front.plans.on_lost, stream, "the scheduler is gone"))
        self._fronts.clear()
        self._worker_sessions.clear()
        self._world.after(self._world.rng.uniform(*SCHEDULER_AWAY_S), self._restart)

    def _restart(self) -> None:
        self.core = self._core(self._config, self._world.rng, began_s=self._world.now_s)
        self.up = True
        for worker in self._cluster.workers.values():
            self._world.after(self._world.rng.uniform(0.01, 0.2), self.join, worker)


class SimCluster:
    """Everything of one run."""

    def __init__(
        self,
        seed: int,
        *,
        telling: bool = False,
        flow: type[RequestFlow] = RequestFlow,
        worker: type[SimWorker] = SimWorker,
        desk: type[PlanDesk] = PlanDesk,
        core: type[SchedulerCore] = SchedulerCore,
    ) -> None:
        self.world = world = World(seed, telling=telling)
        self.faults: Faults = faults.draw(world.rng)
        self.scheduler = SimScheduler(world, self, core)
        names = [("prefill-0", Stage.PREFILL), ("prefill-1", Stage.PREFILL)]
        names += [("decode-0", Stage.DECODE), ("decode-1", Stage.DECODE)]
        self.workers: dict[str, SimWorker] = {}
        for name, stage in names:
            self.workers[name] = worker(world, name, stage, self.faults, self.workers.__getitem__)
            self.scheduler.join(self.workers[name])
        self.fronts = [SimFront(world, f"front-{index}", self.faults, self, desk) for index in range(2)]
        for front in self.fronts:
            front.plans.dial(front.plans.desk.address)
            # A front proxy that has seen no worker serves nobody.
            front.plans.hear(self.scheduler.view())
        self.clients: list[Client] = []
        for asked in workload.draw(
            world.rng, self.faults, requests=REQUESTS_SINGLE if self.faults.single else REQUESTS
        ):
            client = Client(world.rng.choice(self.fronts), asked, flow)
            self.clients.append(client)
            world.after(asked.arrives_s, self._arrive, client)
        self._plan_trouble()
        world.tell("faults", self.faults)

    def dial(self, front: SimFront, address: str) -> None:
        """A front proxy calls the scheduler at that address; there is one."""
        del address
        self.scheduler.connect(front)

    def delay_s(self) -> float:
        """How long one message is under way."""
        rng = self.world.rng
        if rng.random() < self.faults.late:
            return rng.uniform(0.01, 0.2)
        return 0.0003 + rng.random() * 0.001

    def open_link(self, front: SimFront, worker: Placement) -> Link | None:
        """A stream to that incarnation; None when it is not there any more."""
        there = self.workers[worker.worker_id]
        if not there.alive or there.epoch != worker.epoch:
            return None
        link = Link(self.world.number(), front, there, Stream(self.world, self.delay_s))
        there.links.append(link)
        return link

    def run(self) -> None:
        """Let everything happen and check what must hold. Raises Violation or AssertionError."""
        self._tick()
        while self._busy:
            if self.world.now_s > RUN_S_MAX:
                raise Violation("a request outlived its deadline")
            self.world.run(self.world.now_s + 0.5)
        awake_s = max(worker.frozen_until_s for worker in self.workers.values())
        self.world.run(max(self.world.now_s, awake_s) + SETTLE_S)
        checkers.check_the_end(self)

    @property
    def _busy(self) -> bool:
        """Whether any client waits."""
        return any(client.front.alive and client.flow.phase is not Phase.DONE for client in self.clients)

    def _arrive(self, client: Client) -> None:
        if client.front.alive:
            client.arrive()

    def _tick(self) -> None:
        for worker in self.workers.values():
            worker.tick()
            self.scheduler.report(worker)
        self.scheduler.tick()
        checkers.check_bounds(self)
        self.world.after(TICK_S, self._tick)

    def _plan_trouble(self) -> None:
        world, odds = self.world, self.faults
        for what, count in (
            (self._crash_worker, odds.worker_crashes),
            (self._freeze_worker, odds.worker_freezes),
            (self._drain_worker, odds.drains),
            (self._cut_stream, odds.stream_cuts),
            (self.scheduler.crash, odds.scheduler_restarts),
            (self._crash_front, odds.front_crashes),
        ):
            for _ in range(count):
                world.after(world.rng.uniform(0.0, TROUBLE_S), what)

        at_s = 0.0
        singles = (
            self._crash_worker,
            self._freeze_worker,
            self._freeze_for_long,
            self._drain_worker,
            self._cut_stream,
            self.scheduler.crash,
        )
        for _ in range(odds.single):
            at_s += world.rng.uniform(0.05, 0.5)
            what = world.rng.choice(singles)
            world.after(at_s, self._while_busy, what)
            at_s += RECOVERED_S + (LONG_FREEZE_S if what == self._freeze_for_long else FREEZE_S)[1]

    def _while_busy(self, what: Callable[[], None]) -> None:
        if self._busy:
            what()

    def _freeze_worker(self) -> None:
        worker = self.world.rng.choice(list(self.workers.values()))
        if worker.alive and not worker.frozen:
            worker.freeze(self.world.rng.uniform(*FREEZE_S))

    def _freeze_for_long(self) -> None:
        worker = self.world.rng.choice(list(self.workers.values()))
        worker.freeze(self.world.rng.uniform(*LONG_FREEZE_S))

    def _drain_worker(self) -> None:
        worker = self.world.rng.choice(list(self.workers.values()))
        if worker.alive and not worker.frozen:
            worker.drain()
            self.scheduler.report(worker)
            self.world.after(self.world.rng.uniform(*DRAIN_S), self._end_drain, worker, worker.epoch)

    def _end_drain(self, worker: SimWorker, epoch: int) -> None:
        if worker.alive and worker.epoch == epoch:
            self._end_worker(worker)

    def _crash_worker(self) -> None:
        worker = self.world.rng.choice(list(self.workers.values()))
        if worker.alive:
            self._end_worker(worker)

    def _end_worker(self, worker: SimWorker) -> None:
        world = self.world
        worker.crash()
        world.after(self.delay_s(), self.scheduler.leave, worker.worker_id)
        world.after(world.rng.uniform(*world.rng.choice(RESTARTS_S)), self._restart_worker, worker)

    def _restart_worker(self, worker: SimWorker) -> None:
        worker.start()
        self.world.tell(worker.worker_id, f"starts again, epoch {worker.epoch}")
        self.scheduler.join(worker)

    def _cut_stream(self) -> None:
        links = [link for worker in self.workers.values() for link in worker.links]
        if links:
            link = self.world.rng.choice(links)
            self.world.tell(link.worker.worker_id, f"stream to {link.front.name} is cut")
            link.worker.cut(link)

    def _crash_front(self) -> None:
        self.world.rng.choice(self.fronts).crash()


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a run went. ``broken`` is None when every invariant held."""

    seed: int
    broken: str | None
    outcomes: dict[str, int]
    retries: int
    story: tuple[str, ...] = ()


def simulate(
    seed: int,
    *,
    telling: bool = False,
    flow: type[RequestFlow] = RequestFlow,
    worker: type[SimWorker] = SimWorker,
    desk: type[PlanDesk] = PlanDesk,
    core: type[SchedulerCore] = SchedulerCore,
) -> Verdict:
    """One run; the same seed gives the same run. Tests plant bugs with ``flow``, ``worker``, ``desk`` and ``core``."""
    cluster = SimCluster(seed, telling=telling, flow=flow, worker=worker, desk=desk, core=core)
    broken = None
    try:
        cluster.run()
    except AssertionError as error:
        broken = f"{type(error).__name__}: {error}"
    outcomes: dict[str, int] = {}
    for client in cluster.clients:
        outcome = client.finish.outcome if client.finish is not None else "front_died"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    retries = sum(max(client.flow.attempt - 1, 0) for client in cluster.clients)
    return Verdict(seed=seed, broken=broken, outcomes=outcomes, retries=retries, story=tuple(cluster.world.story))


def _facts(worker: SimWorker) -> WorkerFacts:
    info = worker.info
    return WorkerFacts(
        worker_id=worker.worker_id,
        role=Role.PREFILL if worker.stage is Stage.PREFILL else Role.DECODE,
        address=worker.worker_id,
        epoch=worker.epoch,
        model=info.model,
        layout_fingerprint=info.layout_fingerprint,
        block_size_tokens=info.block_size_tokens,
        kv_blocks_total=info.kv_blocks_total,
        engine_version=info.engine_version,
        context_tokens_max=info.context_tokens_max,
        requests_max=worker.requests_max,
    )
