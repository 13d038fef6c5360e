"""One simulated cluster: production's schedulers, workers and front proxies in virtual time. Breaks nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from front_proxy.config import FrontProxyLimits
from protos.scheduler.v1 import scheduler_pb2
from protos.worker.v1 import worker_pb2
from runtime.roles import Role
from simulation.faults.accounts import COUNTED, SimAccounts, Terms
from simulation.faults.clients import Client
from simulation.faults.fault_kinds import Faults
from simulation.faults.invariants import Invariant
from simulation.faults.leadership import LeaseStore
from simulation.faults.processes import (
    CROWDED_FACTOR,
    ROOMY_FACTOR,
    FrontProcess,
    Member,
    SchedulerProcess,
    WorkerProcess,
)
from simulation.faults.settings import Settings, drawn
from simulation.kernel.process_loop import ProcessLoop
from simulation.kernel.streams import Network
from simulation.kernel.world import Violation, World

# Messages that production repeats: as a sign of life, from time to time, or on a new stream while the old one is
# open at the other end. They may come twice in a row. gRPC repeats nothing, so no others do.
SAID_AGAIN = frozenset({"load", "leases", "ended", "suspect", "running", "view", "abort", "release"})
# Longest gap: one stall, a new place and its prompt, with every message late.
GAP_S_MAX = 3.5
# All processes have found the scheduler by then, however late messages are.
GATHER_S_MAX = 10.0


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """How many processes of each role."""

    prefill: int = 2
    decode: int = 2
    front_proxies: int = 2
    schedulers: int = 1

    def roles(self) -> dict[str, Role]:
        """The role of every process, by the name that `baton up` gives it."""
        several = self.schedulers > 1
        names = [f"scheduler-{index}" for index in range(self.schedulers)] if several else ["scheduler"]
        roles: dict[str, Role] = dict.fromkeys(names, "scheduler")
        roles |= {f"prefill-{index}": "prefill" for index in range(self.prefill)}
        roles |= {f"decode-{index}": "decode" for index in range(self.decode)}
        roles |= {f"front-proxy-{index}": "front_proxy" for index in range(self.front_proxies)}
        return roles


class SimCluster:
    """The processes of one run and what connects them."""

    def __init__(
        self,
        world: World,
        faults: Faults,
        settings: Settings,
        topology: Topology,
        *,
        terms: Terms = COUNTED,
        drawn: bool = False,
    ) -> None:
        """``drawn``: some settings are drawn for each front proxy."""
        self.world = world
        self.faults = faults
        self.settings = settings
        self.store = LeaseStore() if topology.schedulers > 1 else None
        self.gap_s_max = GAP_S_MAX
        self.room = (CROWDED_FACTOR if faults.crowded else ROOMY_FACTOR) if faults.single else 1
        self.keepalive_s = settings.keepalive_s if topology.schedulers > 1 else 0.0
        self.clients: dict[str, Client] = {}
        """By the id of the request; not yet checked at their end."""
        self.loops: list[ProcessLoop] = []
        self.errors: list[str] = []
        self.network = Network(world, delay_s=self._delay_s, arrives=self._arrives)
        self.on_stepped_down: Callable[[SchedulerProcess], object] = lambda _scheduler: None
        """Called when a scheduler ends itself because it leads no more."""
        self.ended: set[str] = set()
        """Workers that were ended because they were not needed."""
        self._drawn = drawn
        self.accounts = SimAccounts(world, terms)
        roles = topology.roles()
        self.scheduler_addresses = ",".join(name for name, role in roles.items() if role == "scheduler")
        self.schedulers: dict[str, SchedulerProcess] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.fronts: list[FrontProcess] = []
        for name, role in roles.items():
            match role:
                case "scheduler":
                    self.schedulers[name] = SchedulerProcess(self, name)
                case "prefill" | "decode":
                    self.workers[name] = WorkerProcess(self, name)
                case "front_proxy":
                    self.fronts.append(FrontProcess(self, name))

    @property
    def processes(self) -> list[Member]:
        """All, schedulers first."""
        return [*self.schedulers.values(), *self.workers.values(), *self.fronts]

    @property
    def leader(self) -> SchedulerProcess | None:
        """The scheduler that leads."""
        return next((scheduler for scheduler in self.schedulers.values() if scheduler.leads), None)

    def check_who_decides(self, scheduler: SchedulerProcess) -> None:
        """One decides at a time. Raises Violation."""
        others = [other.name for other in self.schedulers.values() if other.leads and other is not scheduler]
        if others:
            raise Violation(f"{Invariant.ONE_LEADS}: {scheduler.name} does while {others} may")

    def add(self, client: Client) -> None:
        """A client that will come."""
        self.clients[client.asked.request_id] = client

    def forget(self, client: Client) -> None:
        """Forget a client that has ended."""
        del self.clients[client.asked.request_id]

    def client_of(self, request_id: str) -> Client:
        """The client of a request by the id that workers know."""
        return self.clients[request_id.split("-", maxsplit=1)[0]]

    def limits_of_a_front(self) -> FrontProxyLimits:
        """The limits of one start of a front proxy."""
        limits = self.settings.front_limits
        return drawn(limits, self.world.rng, self.faults) if self._drawn else limits

    def on_error(self, context: dict[str, Any]) -> None:
        """A task failed and no code looked at its error."""
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def known_to_leader(self) -> bool:
        """Whether the leader knows every process, and knows that every worker is ready."""
        leader = self.leader
        if leader is None or leader.shell.core.recovering:
            return False
        core = leader.shell.core
        ready = [worker for worker in core.cluster.workers.values() if worker.ready]
        return len(ready) == len(self.workers) and len(core.fronts) == len(self.fronts)

    def gather(self) -> None:
        """Run until every front proxy has seen every worker. Before that no request comes. Raises Violation."""
        while not (self.known_to_leader() and all(self._knows_all(front) for front in self.fronts)):
            if self.world.now_s > GATHER_S_MAX:
                raise Violation("the cluster does not come up")
            self.world.run(self.world.now_s + 0.1)

    def restart(self, process: Member) -> None:
        """Start a process again that has ended."""
        if not process.alive:
            process.start()

    def bury(self) -> None:
        """The run is over."""
        for loop in self.loops:
            loop.bury()
        self.accounts.close()

    def _delay_s(self) -> float:
        rng = self.world.rng
        if self.faults.late and rng.random() < self.faults.late:
            return rng.uniform(0.01, 0.2)
        return 0.0003 + rng.random() * 0.001

    def _arrives(self, message: Any, twice: bool) -> Any | None:
        if not (twice or self.faults.repeat or self.faults.plan_lost) or type(message) is worker_pb2.AttachResponse:
            return message
        times = [self._times(said, twice) for said in message.messages]
        if times.count(1) == len(times):
            return message
        arrived = type(message)()
        arrived.CopyFrom(message)
        del arrived.messages[:]
        arrived.messages.extend(said for said, count in zip(message.messages, times, strict=True) for _ in range(count))
        return arrived if arrived.messages else None

    def _times(self, said: Any, twice: bool) -> int:
        """How often one entry of a list arrives."""
        faults, rng, what = self.faults, self.world.rng, said.WhichOneof("message")
        if faults.plan_lost and type(said) is scheduler_pb2.FrontReply and what in ("plan", "refused", "waiting"):
            return 0 if rng.random() < faults.plan_lost else 1
        repeated = faults.repeat > 0 and what in ("ended", "release") and rng.random() < faults.repeat
        return 2 if repeated or (twice and what in SAID_AGAIN) else 1

    def _knows_all(self, front: FrontProcess) -> bool:
        return front.plans.plan_client.connected and len(front.dispatcher.cluster().workers) == len(self.workers)
