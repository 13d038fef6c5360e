"""One run: two groups of one model, a scheduler, and faults drawn from the seed. What must hold is checked throughout.

Messages are lost, late, doubled and changed on their way; ranks and schedulers die in any phase; engines rest.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np

from engine.expert_map import ExpertMap
from engine.expert_rank import Arm, Command, RankReport, Stage
from scheduler.experts.decide import Bounds
from scheduler.experts.groups import Experts, GroupKey, Solve, Tell, Told
from scheduler.experts.rollout import Ended, Outcome, Phase
from simulation.experts.ranks import EXPERTS, LAYERS, WIDTH, RankGroup, report_of
from simulation.kernel.world import Violation, World

FAULTS_S, SETTLE_S, TICK_S = 60.0, 400.0, 1.0
_SOLVE_S = 0.5


class Faults(msgspec.Struct, frozen=True):
    """How likely each is, for a message or in the run."""

    lost: float
    late: float
    doubled: float
    changed: float
    rank_deaths: int
    scheduler_deaths: int
    rests: int


class SeededRun:
    """Everything of one run."""

    def __init__(self, seed: int, *, event_log: bool = False) -> None:
        self.world = World(seed, event_log=event_log)
        rng = self.world.rng
        self.faults = Faults(
            rng.choice((0, 0.1, 0.3)), rng.choice((0, 0.2, 0.5)), rng.choice((0, 0.2, 0.6)), rng.choice((0, 0.1)),
            rng.randrange(3), rng.randrange(3), rng.randrange(3),
        )  # fmt: skip
        self.outcomes: Counter[str] = Counter()
        self.leader_epoch = 0
        self.reports: dict[tuple[GroupKey, int, int], RankReport] = {}
        """By group, rank and epoch: what the scheduler has been told last."""
        self.groups: dict[GroupKey, RankGroup] = {}
        self._elect()
        tokens = rng.choice((100, 100, 100, 100_000))
        for role, experts in (("prefill", range(0, EXPERTS, 2)), ("decode", range(1, EXPERTS, 2))):
            key = GroupKey("model", role, f"{role}-0")
            self.groups[key] = RankGroup(self.world, key, rng.choice((2, 2, 3)), experts, tokens, self._to_scheduler)

    def run(self) -> None:
        """Let everything happen. Raises Violation or AssertionError."""
        world, rng = self.world, self.world.rng
        for group in self.groups.values():
            for _ in range(self.faults.rank_deaths):
                world.at(rng.uniform(0, FAULTS_S), group.die)
            for _ in range(self.faults.rests):
                world.at(rng.uniform(0, FAULTS_S), group.rest, rng.uniform(1, 200))
            for _ in range(6):
                world.at(rng.uniform(0, FAULTS_S), self._apply, group.key)
        for _ in range(self.faults.scheduler_deaths):
            world.at(rng.uniform(0, FAULTS_S), self._elect)
        world.after(TICK_S, self._tick)
        world.run(FAULTS_S)
        self.faults = Faults(0, 0, 0, 0, 0, 0, 0)
        while world.now_s < FAULTS_S + SETTLE_S and self._unsettled():
            world.run(world.now_s + 10)
        if why := self._unsettled():
            raise Violation(why)

    def _elect(self) -> None:
        """The scheduler dies, and another leads; what the old one sent may still be on its way."""
        self.leader_epoch += 1
        self.scheduler = Experts(self.leader_epoch, Bounds(moves_cool_down_s=20.0, horizon_s=1e9))
        self.reports.clear()
        for group in self.groups.values():
            for one in group.ranks:
                one.scheduler = 0
        self.world.log("scheduler", f"leads as {self.leader_epoch}")

    def _tick(self) -> None:
        self.world.after(TICK_S, self._tick)
        self._do(self.scheduler.tick(self.world.now_s))

    def _apply(self, key: GroupKey) -> None:
        """An operator gives a map, or asks for the one before."""
        rng, size = self.world.rng, self.groups[key].size
        order = np.array(rng.sample(range(EXPERTS), EXPERTS))[np.arange(size * WIDTH) % EXPERTS]
        placed = ExpertMap.shared(EXPERTS, order.reshape(1, size, WIDTH).repeat(LAYERS, axis=0))
        try:
            if rng.random() < 0.2:
                self._do(self.scheduler.rollback(key, self.world.now_s))
            else:
                self._do(self.scheduler.apply(key, placed, self.world.now_s))
        except ValueError as refused:
            self.outcomes["refused"] += 1
            self.world.log("operator", refused)

    def _do(self, actions: list[Tell | Solve | Told]) -> None:
        for action in actions:
            match action:
                case Tell():
                    self._check_arm(action)
                    self._carry(self._at_rank, action, self.leader_epoch)
                case Solve():
                    self._check_counts(action)
                    self.world.after(_SOLVE_S, self._solved, action, self.scheduler)
                case Told(what=Ended() as ended):
                    self.outcomes[ended.outcome] += 1
                    self.world.log("scheduler", ended)
                    if ended.outcome is Outcome.DIVERGED:
                        raise Violation(f"{action.key}: {ended.why}")
                case Told():
                    self.outcomes["alarm"] += 1

    def _solved(self, action: Solve, scheduler: Experts) -> None:
        if scheduler is self.scheduler:
            made = action.run()
            self._do(scheduler.solved(action.key, action.facts.epoch, action.live.digest, made, self.world.now_s))

    def _carry(self, where: object, *what: object) -> None:
        """Over the network: lost, late, doubled."""
        rng, faults = self.world.rng, self.faults
        for _ in range(2 if rng.random() < faults.doubled else 1):
            if rng.random() >= faults.lost:
                delay_s = rng.uniform(0.5, 12.0) if rng.random() < faults.late else rng.uniform(0.001, 0.05)
                self.world.after(delay_s, where, *what)  # type: ignore[arg-type]

    def _at_rank(self, action: Tell, leader_epoch: int) -> None:
        group, command = self.groups[action.key], action.command
        if (leader_epoch, command.epoch) == (self.leader_epoch, group.epoch) and action.rank < len(group.ranks):
            group.ranks[action.rank].scheduler = leader_epoch
        self.world.log(action.key.role, (action.rank, type(command).__name__, command.version))
        group.take(action.rank, command, self._wire(command))

    def _wire(self, command: Command) -> tuple[bytes, bytes] | None:
        if not isinstance(command, Stage):
            return None
        slots, columns = command.placed.slots_bytes, command.placed.columns_bytes
        rng = self.world.rng
        if rng.random() < self.faults.changed:
            at = 2 * rng.randrange(len(slots) // 2)
            slots = slots[:at] + bytes([rng.randrange(EXPERTS)]) + slots[at + 1 :]
        return slots, columns

    def _to_scheduler(self, group: RankGroup, rank: int, sent: object) -> None:
        self._carry(self._at_scheduler, group, rank, sent, self.leader_epoch)

    def _at_scheduler(self, group: RankGroup, rank: int, sent: object, leader_epoch: int) -> None:
        """A stream ends with its scheduler: what was sent to the one before does not reach the next."""
        if leader_epoch != self.leader_epoch:
            return
        key, scheduler, now_s = group.key, self.scheduler, self.world.now_s
        try:
            if isinstance(sent, tuple) and len(sent) == 3:
                facts, report, maps = sent
                actions = scheduler.registered(key, facts, rank, report, maps, now_s)
            elif isinstance(sent, RankReport):
                if key not in scheduler.groups:
                    return
                actions = scheduler.reported(key, rank, sent, now_s)
            else:
                if key in scheduler.groups and isinstance(sent, tuple):
                    scheduler.counted(key, rank, *sent)
                return
        except ValueError as refused:
            self.world.log("scheduler", refused)
            return
        self._remember(key, rank, report_of(sent))
        for action in actions:
            # What is checked of an Arm is what the scheduler knew when it sent it.
            self._do([action])

    def _remember(self, key: GroupKey, rank: int, report: RankReport | None) -> None:
        if report is None:
            return
        known = self.reports.get((key, rank, report.epoch))
        if known is None or report.number > known.number:
            self.reports[key, rank, report.epoch] = report

    def _check_arm(self, action: Tell) -> None:
        """Nothing is armed before every rank has said that it holds the same map."""
        command = action.command
        if not isinstance(command, Arm):
            return
        group = self.groups[action.key]
        said = [self.reports.get((action.key, rank, command.epoch)) for rank in range(group.size)]
        held = {
            (report.staged_version or report.live_version, report.staged_digest or report.live_digest)
            for report in said
            if report is not None
        }
        if None in said or len(held) != 1 or held.pop()[0] != command.version:
            raise Violation(f"{action.key}: version {command.version} is armed, and ranks hold {said}")

    def _check_counts(self, action: Solve) -> None:
        """A pool is planned for by its own tokens alone."""
        others = [expert for expert in range(EXPERTS) if expert not in self.groups[action.key].experts]
        if action.counts[:, others].any():
            raise Violation(f"{action.key}: its plan counts tokens of another pool")

    def _unsettled(self) -> str:
        """What still differs from: all is committed or as it was, and the last committed map is live in any epoch."""
        for key, group in self.groups.items():
            known = self.scheduler.groups.get(key)
            if known is None or known.rollout.phase is not Phase.IDLE:
                return f"{key}: still {known and known.rollout.phase}"
            live = {one.live.digest for one in group.ranks}
            if set(known.rollout.live_digests.values()) != live or known.live is None:
                return f"{key}: the scheduler takes {known.rollout.live_digests} for live, and {live} is"
            if known.history and known.history[-1].placed.digest not in live:
                return f"{key}: the last committed map is not live"
        return ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a run went. ``broken`` is None when everything held."""

    seed: int
    broken: str | None
    outcomes: Counter[str]
    applied: int
    event_log: tuple[str, ...] = ()


def simulate(seed: int, *, event_log: bool = False) -> Verdict:
    """One run; the same seed gives the same run."""
    run = SeededRun(seed, event_log=event_log)
    broken = None
    try:
        run.run()
    except (AssertionError, LookupError, ValueError) as error:
        broken = f"{type(error).__name__}: {error}"
    applied = sum(group.applied for group in run.groups.values())
    return Verdict(
        seed=seed, broken=broken, outcomes=run.outcomes, applied=applied, event_log=tuple(run.world.event_log)
    )
