"""One run of a few requests under faults drawn from its seed, and its verdict."""

from __future__ import annotations

from typing import Any

import msgspec

from front_proxy.request.events import RequestPhase
from simulation.faults import checkers, fault_kinds, workload
from simulation.faults.cluster import Parts, SimCluster, Topology
from simulation.faults.fault_injector import TROUBLE_S, Trouble
from simulation.faults.fronts import Client
from simulation.faults.settings import REFUSING_CONFIG, SCHEDULER_CONFIG, Settings
from simulation.kernel.world import Violation, World

REQUESTS = 8
# Where failures come one at a time, so that each finds streams to break.
REQUESTS_SINGLE = 16
CHECK_S = 0.25
# Longer than every deadline, plan timeout and late message together.
SETTLE_S = 3.0
RUN_S_MAX = 40.0


class SeededRun:
    """Everything of one run."""

    def __init__(self, seed: int, *, telling: bool, parts: Parts) -> None:
        self.world = world = World(seed, telling=telling)
        drawn = fault_kinds.draw(world.rng)
        world.tell("faults", drawn)
        config = world.rng.choice((SCHEDULER_CONFIG, REFUSING_CONFIG))
        settings = Settings()
        self.cluster = SimCluster(world, drawn, settings, config, Topology(schedulers=drawn.schedulers), parts)
        self.clients = self.cluster.clients
        self._began_s = world.now_s
        requests = REQUESTS_SINGLE if drawn.single else REQUESTS
        for asked in workload.draw(world.rng, drawn, requests=requests):
            client = Client(world.rng.choice(self.cluster.fronts), asked, parts.flow)
            self.clients.append(client)
            world.after(asked.arrives_s, client.front.when_awake, self._arrive, client)
        Trouble(self.cluster, lambda: self._busy).plan()

    def run(self) -> None:
        """Let everything happen and check what must hold. Raises Violation or AssertionError."""
        world = self.world
        self._check()
        while self._busy:
            if world.now_s > RUN_S_MAX:
                raise Violation("a request outlived its deadline")
            world.run(world.now_s + 0.5)
        world.run(max(world.now_s, self._began_s + TROUBLE_S))
        processes = self.cluster.processes
        over_s = max(max(each.frozen_until_s, each.silent_until_s, each.cut_until_s) for each in processes)
        world.run(max(world.now_s, over_s) + SETTLE_S)
        checkers.check_the_end(self.cluster)

    @property
    def _busy(self) -> bool:
        """Whether any client waits."""
        return any(client.front.alive and client.flow.phase is not RequestPhase.DONE for client in self.clients)

    def _arrive(self, client: Client) -> None:
        if client.front.alive:
            client.arrive()

    def _check(self) -> None:
        checkers.check_bounds(self.cluster)
        self.world.after(CHECK_S, self._check)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a run went. ``broken`` is None when every invariant held."""

    seed: int
    broken: str | None
    outcomes: dict[str, int]
    retries: int
    story: tuple[str, ...] = ()


def simulate(seed: int, *, telling: bool = False, **planted: Any) -> Verdict:
    """One run; the same seed gives the same run. Tests plant bugs, by the names in ``Parts``."""
    run = SeededRun(seed, telling=telling, parts=Parts(**planted))
    broken = None
    try:
        run.run()
    except (AssertionError, LookupError) as error:
        # A machine that looks for what it has forgotten, or for whom, is broken too.
        broken = f"{type(error).__name__}: {error}"
    outcomes: dict[str, int] = {}
    for client in run.clients:
        outcome = client.finish.outcome if client.finish is not None else "front_died"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    retries = sum(max(client.flow.attempt - 1, 0) for client in run.clients)
    return Verdict(seed=seed, broken=broken, outcomes=outcomes, retries=retries, story=tuple(run.world.story))
