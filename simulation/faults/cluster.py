"""One simulated cluster: production schedulers, workers and front proxies on one heap of events. Breaks nothing."""

from __future__ import annotations

import msgspec

from front_proxy.planning.plan_client import PlanClient
from front_proxy.request.flow import RequestFlow
from front_proxy.request.work import Stage
from scheduler.api.worker_info import WorkerState
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from simulation.faults.fault_kinds import Faults, Target
from simulation.faults.fronts import Client, SimFront
from simulation.faults.invariants import Invariant
from simulation.faults.lease_store import LeaseStore
from simulation.faults.scheduler_connection import REFUSED_S, Dial
from simulation.faults.schedulers import SimScheduler
from simulation.faults.settings import Settings
from simulation.faults.workers import Link, SimWorker
from simulation.kernel.network import UP, Process, Stream
from simulation.kernel.world import Violation, World

# One stall, a place elsewhere and a prompt there, with every message on the way late.
GAP_S_MAX = 3.5
# Everybody has found the scheduler by then, however late messages are.
GATHER_S_MAX = 10.0


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster is made of. Tests plant bugs here."""

    flow: type[RequestFlow] = RequestFlow
    worker: type[SimWorker] = SimWorker
    front: type[SimFront] = SimFront
    scheduler: type[SimScheduler] = SimScheduler
    core: type[SchedulerCore] = SchedulerCore
    plan_client: type[PlanClient] = PlanClient


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """How many processes of each role."""

    prefill: int = 2
    decode: int = 2
    front_proxies: int = 2
    schedulers: int = 1

    def targets(self) -> list[Target]:
        """Every process by the name that `baton up` gives it."""
        several = self.schedulers > 1
        names = [f"scheduler-{index}" for index in range(self.schedulers)] if several else ["scheduler"]
        targets = [Target(name, "scheduler") for name in names]
        targets += [Target(f"prefill-{index}", "prefill") for index in range(self.prefill)]
        targets += [Target(f"decode-{index}", "decode") for index in range(self.decode)]
        return targets + [Target(f"front-proxy-{index}", "front_proxy") for index in range(self.front_proxies)]


class SimCluster:
    """The processes of one run and what connects them."""

    def __init__(
        self, world: World, faults: Faults, settings: Settings, config: SchedulerConfig, topology: Topology,
        parts: Parts,
    ) -> None:  # fmt: skip
        self.world = world
        self.faults = faults
        self.settings = settings
        self.parts = parts
        self.store = LeaseStore() if topology.schedulers > 1 else None
        self.gap_s_max = GAP_S_MAX
        self.clients: list[Client] = []
        """Whose end is not checked yet."""
        self.schedulers: dict[str, SimScheduler] = {}
        self.workers: dict[str, SimWorker] = {}
        self.fronts: list[SimFront] = []
        for target in topology.targets():
            match target.role:
                case "scheduler":
                    made = parts.scheduler(world, target.process_id, self, config, self.store, parts.core)
                    self.schedulers[made.name] = made
                case "prefill" | "decode":
                    stage = Stage.PREFILL if target.role == "prefill" else Stage.DECODE
                    self.workers[target.process_id] = parts.worker(
                        world, target.process_id, stage, faults, settings, self.workers.__getitem__
                    )
                case "front_proxy":
                    self.fronts.append(self._new_front(target.process_id))
        for worker in self.workers.values():
            self.connect(worker)
        for front in self.fronts:
            front.plans.dial(front.plans.plan_client.address)
        self._gather()

    @property
    def processes(self) -> list[Process]:
        """All, schedulers first."""
        return [*self.schedulers.values(), *self.workers.values(), *self.fronts]

    @property
    def leader(self) -> SimScheduler | None:
        """The scheduler that leads."""
        return next((scheduler for scheduler in self.schedulers.values() if scheduler.leads), None)

    def check_who_decides(self, scheduler: SimScheduler) -> None:
        """One decides at a time. Raises Violation."""
        others = [other.name for other in self.schedulers.values() if other.leads and other is not scheduler]
        if others:
            raise Violation(f"{Invariant.ONE_LEADS}: {scheduler.name} does while {others} may")

    def delay_s(self) -> float:
        """How long one message is under way."""
        rng = self.world.rng
        if self.faults.late and rng.random() < self.faults.late:
            return rng.uniform(0.01, 0.2)
        return 0.0003 + rng.random() * 0.001

    def link(self, front: SimFront, worker: SimWorker) -> Link:
        """A stream to the present incarnation of a worker."""
        return Link(self.world.number(), front, worker, self.delay_s)

    def connect(self, worker: SimWorker) -> None:
        """Have a worker that has just started look for the scheduler."""
        worker.dial = Dial(worker, self.schedulers, self.settings, self.delay_s)
        worker.dial.dial()

    def dial(self, front: SimFront, address: str) -> None:
        """A front proxy calls the scheduler at that address."""
        scheduler, plans = self.schedulers[address], front.plans
        if not front.reaches(scheduler):
            front.after(REFUSED_S, plans.on_lost, None, "nobody is there")
            return
        stream = Stream(
            self.delay_s,
            scheduler,
            front,
            lost_by_callee=lambda: scheduler.on_lost(stream),
            lost_by_caller=lambda: plans.on_lost(stream, "the stream broke"),
        )
        if len(self.schedulers) > 1:
            stream.keep_alive(self.settings.keepalive_s)
        plans.connected(scheduler, stream)
        stream.send(UP, scheduler.on_front, front, stream)

    def known_to_leader(self) -> bool:
        """Whether the scheduler that leads knows every process, and has heard of every worker that it is ready."""
        leader = self.leader
        if leader is None or leader.core.recovering:
            return False
        ready = [worker for worker in leader.core.cluster.workers.values() if worker.ready]
        return len(ready) == len(self.workers) and len(leader.core.fronts) == len(self.fronts)

    def restart_worker(self, worker: SimWorker) -> None:
        """A new incarnation of one that has ended."""
        if not worker.alive:
            worker.start()
            self.world.tell(worker.worker_id, f"starts again, epoch {worker.epoch}")
            self.connect(worker)

    def restart_front(self, ended: SimFront) -> SimFront:
        """Its successor, which knows nothing of it."""
        successor = self._new_front(ended.name)
        self.fronts[self.fronts.index(ended)] = successor
        self.world.tell(successor.name, "starts again")
        successor.plans.dial(successor.plans.plan_client.address)
        return successor

    def restart_scheduler(self, scheduler: SimScheduler) -> None:
        """A new incarnation of one that has ended."""
        if not scheduler.alive:
            scheduler.start()

    def _new_front(self, name: str) -> SimFront:
        return self.parts.front(self.world, name, self.faults, self.settings, self, self.parts.plan_client)

    def _knows_all(self, front: SimFront) -> bool:
        ready = [entry for entry in front.plans.view.snapshot.workers if entry.state is WorkerState.READY]
        return front.plans.plan_client.connected and len(ready) == len(self.workers)

    def _gather(self) -> None:
        """Nobody is served before every front proxy has seen every worker."""
        while not (self.known_to_leader() and all(self._knows_all(front) for front in self.fronts)):
            if self.world.now_s > GATHER_S_MAX:
                raise Violation("the cluster does not come up")
            self.world.run(self.world.now_s + 0.1)
