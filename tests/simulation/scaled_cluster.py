"""One run in which a cluster is scaled to nothing and back under requests, and its verdict.

The launcher is played: it ends and starts workers as the leading scheduler wants, and both take time. In some runs the
scheduler is lost too.
"""

from __future__ import annotations

import math

import msgspec

from scheduler.config import PriorityClassConfig, ScalingConfig, WaitingConfig
from scheduler.scaling.replicas import SETTLE_S, PoolTarget
from simulation.faults import checkers, workload
from simulation.faults.clients import Client
from simulation.faults.cluster import SimCluster, Topology
from simulation.faults.fault_kinds import Faults
from simulation.faults.invariants import Invariant, hold
from simulation.faults.processes import WorkerProcess
from simulation.faults.settings import SCHEDULER_CONFIG, Settings
from simulation.kernel.quiet import quiet
from simulation.kernel.world import World

SCALING = ScalingConfig(actuator="launcher", idle_s=1.0, wake_timeout_s=40.0)
LOOK_S = 0.1
START_S = (0.1, 4.0)
DRAIN_S_MAX = 20.0
ROUNDS = 4
REQUESTS_A_ROUND = 4
# Around ``idle_s``, so that requests meet every moment of an end.
PAUSE_S = (0.5, 4.0)
SCHEDULER_AWAY_S = 0.5
RUN_S_MAX = 60.0
SETTLED_AFTER_S = 3.0


class ScaledRun:
    """Everything of one run."""

    def __init__(self, seed: int) -> None:
        self.world = world = World(seed)
        rng = world.rng
        # One at a time, and room for everything in half of the workers: no client may notice.
        faults = Faults(single=1, late=rng.choice((0.0, 0.1)), repeat=rng.choice((0.0, 0.3)))
        patient = PriorityClassConfig(wait_max_s=20.0)
        waiting = WaitingConfig(interactive=patient, default=patient, batch=patient)
        scheduler = msgspec.structs.replace(SCHEDULER_CONFIG, scaling=SCALING, scaling_interval_s=0.5, waiting=waiting)
        self.cluster = SimCluster(world, faults, Settings(scheduler=scheduler), Topology(front_proxies=1))
        # A start takes as long as it takes.
        self.cluster.gap_s_max = math.inf
        self.sleeps = 0
        self._awake = True
        self._starting: set[str] = set()

    def run(self) -> None:
        """Let everything happen and check what must hold. Raises Violation or AssertionError."""
        world, cluster, rng = self.world, self.cluster, self.world.rng
        cluster.gather()
        self._look()
        world.run(world.now_s + SETTLE_S)
        for round_number in range(ROUNDS):
            for asked in workload.draw(rng, cluster.faults, requests=REQUESTS_A_ROUND):
                number = round_number * REQUESTS_A_ROUND + asked.number
                changed = msgspec.structs.replace(asked, number=number, deadline_s=RUN_S_MAX, pinned=False)
                client = Client(cluster.fronts[0], changed)
                cluster.add(client)
                world.after(changed.arrives_s, client.front.loop.enter, client.arrive)
            if rng.random() < 0.2:
                world.after(rng.uniform(*PAUSE_S), self._lose_scheduler)
            world.run(world.now_s + rng.uniform(*PAUSE_S))
        until_s = world.now_s + RUN_S_MAX
        while any(not client.outcome for client in cluster.clients.values()) and world.now_s < until_s:
            world.run(world.now_s + LOOK_S)
        world.run(world.now_s + SETTLED_AFTER_S)
        for client in cluster.clients.values():
            told = (client.asked, client.outcome, client.failure)
            hold(Invariant.UNNOTICED, client.outcome == "finished", "a request noticed the scaling", told)
        checkers.check_the_end(cluster)

    def _lose_scheduler(self) -> None:
        [scheduler] = self.cluster.schedulers.values()
        scheduler.crash()
        self.world.after(SCHEDULER_AWAY_S, self.cluster.restart, scheduler)

    def _look(self) -> None:
        """The launcher hears what is wanted."""
        if (leader := self.cluster.leader) is not None:
            for target in leader.shell.core.live_planner.replicas.desired:
                self._act(target)
        self.sleeps += self._awake and not any(worker.alive for worker in self.cluster.workers.values())
        self._awake = any(worker.alive for worker in self.cluster.workers.values())
        self.world.after(LOOK_S, self._look)

    def _act(self, target: PoolTarget) -> None:
        workers = [worker for worker in self.cluster.workers.values() if worker.kind == target.role]
        live = [each for each in workers if (each.alive and not each.draining) or each.name in self._starting]
        order = {name: place for place, name in enumerate(target.worker_ids)}
        live.sort(key=lambda worker: order.get(worker.name, -1))
        for worker in live[: max(0, len(live) - target.replicas)]:
            if worker.name not in self._starting:
                worker.drain()
                self._end(worker, self.world.now_s + DRAIN_S_MAX)
        down = [worker for worker in workers if not worker.alive and worker.name not in self._starting]
        for worker in down[: max(0, target.replicas - len(live))]:
            self._starting.add(worker.name)
            self.world.after(self.world.rng.uniform(*START_S), self._start, worker)

    def _start(self, worker: WorkerProcess) -> None:
        self._starting.discard(worker.name)
        self.cluster.ended.discard(worker.name)
        worker.start()

    def _end(self, worker: WorkerProcess, until_s: float) -> None:
        """As a worker ends: when nothing is left to finish."""
        if worker.busy and self.world.now_s < until_s:
            self.world.after(LOOK_S, self._end, worker, until_s)
            return
        self.cluster.ended.add(worker.name)
        worker.crash()


@quiet()
def simulate(seed: int) -> tuple[str | None, int]:
    """What broke, and how often the cluster was without a worker."""
    run = ScaledRun(seed)
    try:
        run.run()
    except (AssertionError, LookupError) as error:
        return f"{type(error).__name__}: {error}", run.sleeps
    finally:
        run.cluster.bury()
    return None, run.sleeps
