"""One run of a few requests under faults drawn from its seed, and its verdict."""

from __future__ import annotations

import random
from collections import Counter

import msgspec

from simulation.faults import accounts, checkers, fault_kinds, workload
from simulation.faults.clients import Client
from simulation.faults.cluster import SimCluster, Topology
from simulation.faults.fault_injector import FAULTS_WITHIN_S, FaultInjector
from simulation.faults.settings import REFUSING_CONFIG, SCHEDULER_CONFIG, Settings
from simulation.faults.shell_checks import ShellChecks
from simulation.kernel.quiet import quiet
from simulation.kernel.world import Violation, World

REQUESTS = 8
# Where failures come one at a time, so that each finds streams to break.
REQUESTS_SINGLE = 16
FRONT_PROXIES = (1, 2, 2, 2, 3, 4)
RANKS = (1, 1, 1, 2)
CHECK_S = 0.25
# Longer than every deadline, plan timeout and late message together.
SETTLE_S = 3.0
RUN_S_MAX = 40.0


class SeededRun:
    """Everything of one run."""

    def __init__(self, seed: int, *, event_log: bool) -> None:
        self.world = world = World(seed, event_log=event_log)
        drawn = fault_kinds.draw(world.rng)
        world.log("faults", drawn)
        # Of its own, as the next one, so that it leaves everything else of a seed as it is.
        ranks = random.Random(f"ranks of {seed}").choice(RANKS)
        settings = Settings(scheduler=world.rng.choice((SCHEDULER_CONFIG, REFUSING_CONFIG)), ranks=ranks)
        world.log("ranks", ranks)
        rng = random.Random(f"accounts of {seed}")
        terms = accounts.draw(rng, drawn)
        world.log("accounts", terms)
        topology = Topology(schedulers=drawn.schedulers, front_proxies=rng.choice(FRONT_PROXIES))
        self.cluster = SimCluster(world, drawn, settings, topology, terms=terms, drawn=True)
        self.clients = self.cluster.clients.values()
        self._shell_checks = ShellChecks(self.cluster)

    def run(self) -> None:
        """Let everything happen and check what must hold. Raises Violation or AssertionError."""
        world, faults = self.world, self.cluster.faults
        self.cluster.gather()
        faults_end_s = world.now_s + FAULTS_WITHIN_S
        for asked in workload.draw(world.rng, faults, requests=REQUESTS_SINGLE if faults.single else REQUESTS):
            client = Client(world.rng.choice(self.cluster.fronts), asked)
            self.cluster.add(client)
            world.after(asked.arrives_s, client.front.loop.enter, client.arrive)
        FaultInjector(self.cluster, lambda: self._busy).plan()
        self._check()
        while self._busy:
            if world.now_s > RUN_S_MAX:
                raise Violation("a request outlived its deadline")
            world.run(world.now_s + 0.5)
        world.run(max(world.now_s, faults_end_s))
        over_s = max(process.stuck_until_s for process in self.cluster.processes)
        world.run(max(world.now_s, over_s) + SETTLE_S)
        checkers.check_the_end(self.cluster)

    @property
    def _busy(self) -> bool:
        """Whether any client waits."""
        return any(client.front.alive and not client.outcome for client in self.clients)

    def _check(self) -> None:
        checkers.check_bounds(self.cluster)
        self._shell_checks.look()
        self.world.after(CHECK_S, self._check)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a run went. ``broken`` is None when every invariant held."""

    seed: int
    broken: str | None
    outcomes: Counter[str]
    retries: int
    event_log: tuple[str, ...] = ()


@quiet()
def simulate(seed: int, *, event_log: bool = False) -> Verdict:
    """One run; the same seed gives the same run. Tests plant bugs in production's classes."""
    run = SeededRun(seed, event_log=event_log)
    broken = None
    try:
        run.run()
    except (AssertionError, LookupError) as error:
        # A machine that looks for what it has forgotten is broken too.
        broken = f"{type(error).__name__}: {error}"
    finally:
        run.cluster.bury()
    return Verdict(
        seed=seed,
        broken=broken,
        outcomes=Counter(client.outcome or "front_died" for client in run.clients),
        retries=sum(max(client.attempts - 1, 0) for client in run.clients),
        event_log=tuple(run.world.event_log),
    )
