"""Breaks a simulated cluster as ``faults.Faults`` says: everything at once, or one thing after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from runtime.roles import WorkerRole
from scheduler.api.events import FlipRequested
from simulation.faults.cluster import SimCluster
from simulation.faults.processes import Member, SchedulerProcess, WorkerProcess
from simulation.kernel.network import Disorder
from simulation.kernel.streams import Connection

FAULTS_WITHIN_S = 0.6
FREEZE_S = (0.1, 2.0)
LONG_FREEZE_S = (2.0, 6.0)
# What a front proxy that is cut off from all others lasts: its requests are stalled wherever they go.
HOLE_S = (0.1, 1.0)
CUT_OFF_S = (0.1, 1.5)
# Longer than a worker's lease too: it must not take its own sleep for others' silence.
SCHEDULER_FREEZE_S = (0.1, 4.0)
DISORDER_S = (0.2, 1.5)
# A supervisor at hand, or one that backs off.
RESTARTS_S = ((0.005, 0.1), (0.1, 1.0))
SCHEDULER_AWAY_S = (0.02, 1.5)
DRAIN_S = (0.0, 0.3)
FLIPS_S = 1.0
# From the end of one failure to the next one, where they come one at a time.
RECOVERED_S = 2.0

WORKERS_SHARE = 0.5

# How long it lasts.
Fault = Callable[[], float]
Some = TypeVar("Some", bound=Member)


class FaultInjector:
    """One run's. ``plan`` once."""

    def __init__(self, cluster: SimCluster, busy: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._rng = cluster.world.rng
        self._busy = busy
        cluster.on_stepped_down = lambda scheduler: self._restart_later(scheduler, RESTARTS_S[1])

    def plan(self) -> None:
        """Have everything happen that the faults say."""
        odds = self._cluster.faults
        for what, count in (
            (self._crash_worker, odds.worker_crashes),
            (self._freeze_worker, odds.worker_freezes),
            (self._drain_worker, odds.drains),
            (self._cut_stream, odds.stream_cuts),
            (self._crash_scheduler, odds.scheduler_restarts),
            (self._crash_front, odds.front_crashes),
            (self._freeze_other, odds.freezes),
            (self._silence_process, odds.holes),
            (self._silence_stream, odds.link_holes),
            (self._cut_off, odds.cut_offs),
            (self._disorder, odds.disorders),
            (self._flip_worker, odds.flips),
        ):
            for _ in range(count):
                self._world.after(self._rng.uniform(0.0, FAULTS_WITHIN_S), what)
        if odds.single:
            self._world.after(self._rng.uniform(0.05, 0.5), self._next, odds.single)

    def _next(self, left: int) -> None:
        """One thing that may go wrong unnoticed, and the next when all processes are well again."""
        if not self._busy():
            return
        # A worker's faults are most of them: each meets another moment of a stream.
        workers: tuple[Fault, ...] = (
            self._crash_worker, self._freeze_worker, self._freeze_for_long, self._drain_worker, self._cut_stream,
        )  # fmt: skip
        others: tuple[Fault, ...] = (
            self._crash_scheduler, self._freeze_other, self._silence_process, self._silence_stream, self._cut_off,
            self._cut_off, self._disorder,
        )  # fmt: skip
        share = 1.0 if self._cluster.faults.crowded else WORKERS_SHARE
        kinds = workers if self._rng.random() < share else others
        lasts_s = self._rng.choice(kinds)()
        if left > 1:
            self._world.after(lasts_s + RECOVERED_S + self._rng.uniform(0.05, 0.5), self._next, left - 1)

    def _any(self, of: Iterable[Some]) -> Some | None:
        """One that is well."""
        well = [process for process in of if process.well]
        return self._rng.choice(well) if well else None

    def _worker(self) -> WorkerProcess | None:
        return self._any(self._cluster.workers.values())

    def _scheduler(self) -> SchedulerProcess | None:
        """Mostly the one that leads."""
        leader = self._cluster.leader
        if leader is not None and leader.well and self._rng.random() < 0.7:
            return leader
        return self._any(self._cluster.schedulers.values())

    # Processes

    def _crash_worker(self) -> float:
        return self._crash(self._worker())

    def _crash_scheduler(self) -> float:
        return self._crash(self._scheduler(), SCHEDULER_AWAY_S)

    def _crash_front(self) -> float:
        self._rng.choice(self._cluster.fronts).crash()
        return 0.0

    def _crash(self, process: Member | None, away_between_s: tuple[float, float] | None = None) -> float:
        if process is None:
            return 0.0
        away_between_s = away_between_s or self._rng.choice(RESTARTS_S)
        process.crash()
        return self._restart_later(process, away_between_s)

    def _restart_later(self, process: Member, away_between_s: tuple[float, float]) -> float:
        away_s = self._rng.uniform(*away_between_s)
        self._world.after(away_s, self._cluster.restart, process)
        return away_s

    def _drain_worker(self) -> float:
        worker = self._worker()
        if worker is None:
            return 0.0
        worker.drain()
        for_s = self._rng.uniform(*DRAIN_S)
        self._world.after(for_s, self._end_drain, worker, worker.incarnation)
        return for_s + RESTARTS_S[1][1]

    def _end_drain(self, worker: WorkerProcess, incarnation: int) -> None:
        if worker.alive and worker.incarnation == incarnation:
            self._crash(worker)

    def _flip_worker(self) -> float:
        """As `baton flip` has it: the scheduler may object, and the worker may not finish in time."""
        worker, leader = self._worker(), self._cluster.leader
        if worker is not None and leader is not None and leader.well:
            role: WorkerRole = "decode" if worker.body.role.name == "prefill" else "prefill"
            self._world.log(worker.name, f"is to be {role}")
            leader.loop.enter(leader.shell.feed, FlipRequested(worker_id=worker.name, role=role))
        return FLIPS_S

    def _freeze_worker(self) -> float:
        return self._still(self._worker(), FREEZE_S, Member.freeze)

    def _freeze_for_long(self) -> float:
        return self._still(self._worker(), LONG_FREEZE_S, Member.freeze)

    def _freeze_other(self) -> float:
        if self._rng.random() < 0.5:
            return self._still(self._scheduler(), SCHEDULER_FREEZE_S, Member.freeze)
        return self._still(self._any(self._cluster.fronts), FREEZE_S, Member.freeze)

    def _silence_process(self) -> float:
        return self._still(self._any(self._cluster.processes), HOLE_S, Member.silence)

    def _cut_off(self) -> float:
        of = self._cluster.processes if self._rng.random() < 0.5 else self._cluster.fronts
        return self._still(self._any(of), CUT_OFF_S, Member.cut_off)

    def _still(
        self, process: Member | None, between_s: tuple[float, float], how: Callable[[Member, float], None]
    ) -> float:
        """It does nothing, or hears no other. What its clients wait meanwhile is not the cluster's doing."""
        if process is None:
            return 0.0
        for_s = self._rng.uniform(*between_s)
        how(process, for_s)
        process.excused_s = self._world.now_s + for_s
        return for_s

    # Networks

    def _stream(self) -> Connection | None:
        streams = [stream for process in self._cluster.processes for stream in process.streams]
        return self._rng.choice(streams) if streams else None

    def _cut_stream(self) -> float:
        if (stream := self._stream()) is not None:
            self._world.log("network", "a stream is cut")
            stream.cut()
        return 0.0

    def _silence_stream(self) -> float:
        for_s = self._rng.uniform(*HOLE_S)
        if (stream := self._stream()) is not None:
            self._world.log("network", f"a stream is a black hole for {for_s:.3f} s")
            stream.silence(for_s)
        return for_s

    def _disorder(self) -> float:
        process = self._any(self._cluster.processes)
        for_s = self._rng.uniform(*DISORDER_S)
        kind = self._rng.choice(("slow", "late", "twice"))
        if process is None:
            return 0.0
        match kind:
            case "slow":
                process.disturb(Disorder(slow_s=self._rng.uniform(0.01, 0.1)), for_s)
            case "late":
                process.disturb(Disorder(late_max_s=0.3, late_fraction=self._rng.uniform(0.1, 0.5)), for_s)
            case _:
                process.disturb(Disorder(twice=True), for_s)
                # Every stream is lost to its caller, while its other end holds it for whole until the end.
                for stream in list(process.streams):
                    stream.lose_for_caller()
                    self._world.after(for_s, stream.cut)
        return for_s
