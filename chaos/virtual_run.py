"""`baton chaos` in virtual time: the schedule that it draws for a seed, performed on the production machines.

One fault at a time, for as long as on a real cluster and with production's own settings; what clients see is judged as
there, by the same names (``invariants.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import msgspec

from chaos.schedule import ENDING_KINDS, USERS, Fault, FaultKind, Lengths, may_repeat, schedule
from chaos.virtual_users import Counts, Users
from runtime.timing.backoff import backoff_s
from simulation.faults import checkers
from simulation.faults.cluster import SimCluster, Topology
from simulation.faults.fault_kinds import Faults
from simulation.faults.processes import Member, WorkerProcess
from simulation.faults.settings import production_settings
from simulation.kernel.network import Disorder
from simulation.kernel.quiet import quiet
from simulation.kernel.world import Violation, World

EVENTS_MAX = 50_000_000
CHECK_S = 1.0
LOOK_S = 0.2
# Looks in a row that must find everything whole.
LOOKS_WHOLE = 2
DRAIN_S_MAX = 30.0
# From a goodbye until its process is gone.
GOODBYE_S = 0.05
# From its start until a process serves.
START_S = {"scheduler": 0.5, "prefill": 2.0, "decode": 2.0, "front_proxy": 1.0}
# As restart_backoff_min_s and restart_backoff_max_s of launcher/hosted/timing.py.
BACKOFF_S = (0.5, 30.0)
RECOVER_S_MAX = 240.0
SETTLE_S = 10.0
# A client's patience with one request.
GAP_S_MAX = 120.0


class ChaosOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as ``chaos.real_run.ChaosOptions``."""

    topology: Topology = Topology(prefill=1, decode=2)
    kinds: tuple[FaultKind, ...] = ("kill",)
    roles: tuple[str, ...] = ("scheduler", "prefill", "decode", "front_proxy")
    rounds: int = 1
    users: int = USERS
    lengths: Lengths = Lengths()


class ChaosVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """``broken``: an invariant that did not hold; empty: all did."""

    seed: int
    passed: bool
    broken: str
    counts: Counts
    faults: int
    """So many were performed."""
    virtual_s: float
    event_log: tuple[str, ...] = ()


def planned(seed: int, options: ChaosOptions) -> list[Fault]:
    """The schedule, which `baton chaos` draws for the same seed and the same processes."""
    targets = [name for name, role in options.topology.roles().items() if role in options.roles]
    return schedule(seed, targets, options.kinds, rounds=options.rounds)


@quiet()
def run(seed: int, options: ChaosOptions, *, event_log: bool = False) -> ChaosVerdict:
    """One run; the same seed gives the same one. Tests plant bugs in production's classes."""
    chaos = _Chaos(seed, options, event_log=event_log)
    broken = ""
    try:
        chaos.run()
    except AssertionError as error:
        broken = f"{type(error).__name__}: {error}"
    finally:
        chaos.cluster.bury()
    counts = chaos.users.counts
    return ChaosVerdict(
        seed=seed,
        passed=not broken and not counts.failed,
        broken=broken,
        counts=counts,
        faults=chaos.done,
        virtual_s=chaos.world.now_s,
        event_log=tuple(chaos.world.event_log),
    )


class _Chaos:
    def __init__(self, seed: int, options: ChaosOptions, *, event_log: bool) -> None:
        self.world = World(seed, event_log=event_log, events_max=EVENTS_MAX)
        self.done = 0
        self._options = options
        settings = production_settings()
        # Room as where one failure may not be noticed: the other workers of its role hold everything.
        faults = Faults(single=1, schedulers=options.topology.schedulers)
        self.cluster = SimCluster(self.world, faults, settings, options.topology)
        self.cluster.gap_s_max = GAP_S_MAX
        self._left = planned(seed, options)
        self._now: Fault | None = None
        self._deaths: dict[str, int] = {}
        self._over = False
        self.users = Users(self.cluster, seed, lambda name: may_repeat(self._now, name))
        self.cluster.on_stepped_down = self._start_later

    def run(self) -> None:
        """All faults, one after the other. Raises Violation or AssertionError."""
        self.cluster.gather()
        self.users.start(self._options.users)
        self._check()
        self._next()
        limit_s = len(self._left) * (RECOVER_S_MAX + GAP_S_MAX) + GAP_S_MAX
        while not (self._over and not self.users.running):
            if self.world.now_s > limit_s:
                raise Violation("the run does not end: a request or a fault hangs")
            self.world.run(self.world.now_s + 1.0)
        self.world.run(self.world.now_s + SETTLE_S)
        # The end of each was checked when it came; failures that clients saw are counted already.
        self.cluster.clients.clear()
        checkers.check_the_end(self.cluster)

    def _check(self) -> None:
        checkers.check_bounds(self.cluster)
        self.world.after(CHECK_S, self._check)

    def _next(self) -> None:
        self._now = None
        if not self._left:
            self.users.after_more(self._options.users, self._finish)
            return
        fault = self._left.pop(0)
        self.users.after_more(fault.after_requests, lambda: self._hit(fault))

    def _finish(self) -> None:
        self._over = True
        self.users.stop()

    def _hit(self, fault: Fault) -> None:
        self._now = fault
        self.world.log("chaos", fault)
        process = self._process(fault.process_id)
        lasts_s = self._break(fault, process)
        deadline_s = self.world.now_s + lasts_s + RECOVER_S_MAX
        incarnation = process.incarnation
        self.world.after(lasts_s, self._look, fault, incarnation, 0, deadline_s)

    def _look(self, fault: Fault, incarnation: int, looks: int, deadline_s: float) -> None:
        """Until the cluster is whole: every process serves and knows who leads."""
        process = self._process(fault.process_id)
        replaced = fault.kind not in ENDING_KINDS or process.incarnation != incarnation
        well = all(each.well for each in self.cluster.processes)
        looks = looks + 1 if replaced and well and self.cluster.known_to_leader() else 0
        if looks >= LOOKS_WHOLE:
            self.done += 1
            self.users.after_more(self._options.users, self._next)
        elif self.world.now_s > deadline_s:
            raise Violation(f"the cluster is not whole again after {fault}")
        else:
            self.world.after(LOOK_S, self._look, fault, incarnation, looks, deadline_s)

    def _process(self, process_id: str) -> Member:
        return next(process for process in self.cluster.processes if process.name == process_id)

    # Faults

    def _break(self, fault: Fault, process: Member) -> float:
        """Perform it; how long it lasts."""
        lengths = self._options.lengths
        match fault.kind:
            case "kill":
                self._end(process, self._pause_s(process.name))
            case "terminate" | "restart":
                self._drain(process, at_once=fault.kind == "restart")
            case "freeze":
                process.freeze(lengths.freeze_s)
                return lengths.freeze_s
            case "cut":
                process.cut_off(lengths.cut_s)
                return lengths.cut_s
            case "delay":
                process.disturb(Disorder(slow_s=lengths.delay_ms / 1000), lengths.delay_s)
                return lengths.delay_s
            case "blackhole":
                process.silence(lengths.blackhole_s)
                return lengths.blackhole_s
            case _:
                assert_never(fault.kind)
        return 0.0

    def _pause_s(self, process_id: str) -> float:
        """As the supervision of `baton up`, without its window: every death counts."""
        self._deaths[process_id] = deaths = self._deaths.get(process_id, 0) + 1
        return backoff_s(deaths, min_s=BACKOFF_S[0], max_s=BACKOFF_S[1])

    def _start_later(self, process: Member, pause_s: float = BACKOFF_S[0]) -> None:
        role = self._options.topology.roles()[process.name]
        self.world.after(pause_s + START_S[role], self.cluster.restart, process)

    def _drain(self, process: Member, *, at_once: bool) -> None:
        """SIGTERM: it finishes what it runs and ends, and is started again: at once, or as after a death."""
        process.drain()
        self._end_when_idle(process, self.world.now_s + DRAIN_S_MAX, 0.0 if at_once else self._pause_s(process.name))

    def _end_when_idle(self, process: Member, deadline_s: float, pause_s: float) -> None:
        if process.busy and self.world.now_s < deadline_s:
            self.world.after(0.1, self._end_when_idle, process, deadline_s, pause_s)
            return
        if isinstance(process, WorkerProcess):
            process.say_goodbye()
        self.world.after(GOODBYE_S, self._end, process, pause_s)

    def _end(self, process: Member, pause_s: float) -> None:
        process.crash()
        self._start_later(process, pause_s)


def told(verdict: ChaosVerdict, faults: Sequence[Fault]) -> list[str]:
    """The form for people; the verdict is its last line."""
    lines = [f"{fault.kind} {fault.process_id} after {fault.after_requests} requests" for fault in faults]
    counts = verdict.counts
    seen = f"{counts.failed} failed, {counts.repeated} repeated by their client"
    lines.append(f"{counts.requests} requests in {verdict.virtual_s:.0f} s of virtual time: {seen}")
    lines += [f"  {failure}" for failure in counts.failures]
    if verdict.broken:
        lines.append(f"BROKEN {verdict.broken}")
    lines.append(f"{'passed' if verdict.passed else 'FAILED'} (seed {verdict.seed}, {verdict.faults} faults)")
    return lines
