"""Groups: one rollout at a time in a model, what an operator may ask, and a group that starts again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.expert_map import ExpertMap
from engine.expert_rank import Arm, Command, ExpertRank, Stage
from scheduler.experts.decide import Change
from scheduler.experts.groups import Experts, GroupFacts, GroupKey, Solve, Tell, Told
from scheduler.experts.rollout import APPLY_TIMEOUT_S, STAGE_TIMEOUT_S, Alarm, Ended, Outcome, Phase

DECODE, PREFILL = GroupKey("m", "decode", "decode-0"), GroupKey("m", "prefill", "prefill-0")
START = ExpertMap.shared(4, np.array([[[0, 1, 2], [3, 0, 1]]]))
OTHER = ExpertMap.shared(4, np.array([[[0, 3, 2], [3, 2, 1]]]))
THIRD = ExpertMap.shared(4, np.array([[[1, 3, 2], [3, 0, 1]]]))


class Cluster:
    """An Experts machine and groups of two ranks that follow it at once, unless told otherwise."""

    def __init__(self) -> None:
        self.experts = Experts(leader_epoch=1)
        self.now_s = 0.0
        self.ranks: dict[tuple[GroupKey, int], ExpertRank] = {}
        self.told: list[Ended | Alarm] = []
        self.deaf: set[int] = set()
        self.steps = True

    def start(self, key: GroupKey, epoch: int = 1, **facts: Any) -> None:
        known = {"epoch": epoch, "ranks": 2, "layers": 1, "experts": 4, "slots": 6, "expert_bytes": 10} | facts
        for rank in range(2):
            self.ranks[key, rank] = one = ExpertRank(epoch, START.digest, slots_shape=(1, 2, 3), experts=4)
            self.play(self.experts.registered(key, GroupFacts(**known), rank, one.report(), (START,), self.now_s))

    def play(self, actions: Sequence[Tell | Solve | Told]) -> None:
        for action in actions:
            match action:
                case Tell():
                    if action.rank not in self.deaf:
                        self.command(action.key, action.rank, action.command)
                case Told():
                    self.told.append(action.what)
                case Solve():
                    made = action.run()
                    base = action.live.digest
                    self.play(self.experts.solved(action.key, action.facts.epoch, base, made, self.now_s))

    def command(self, key: GroupKey, rank: int, command: Command) -> None:
        self.ranks[key, rank].handle(command)
        self.play(self.experts.reported(key, rank, self.ranks[key, rank].report(), self.now_s))
        if isinstance(command, Arm) and self.steps:
            self.step(key)

    def step(self, key: GroupKey) -> None:
        both = [self.ranks[key, rank] for rank in range(2)]
        reduced = [min(numbers) for numbers in zip(*(one.vote() for one in both), strict=True)]
        for rank, one in enumerate(both):
            if (placed := one.agreed(reduced)) is not None:
                one.applied(placed.digest)
                self.play(self.experts.reported(key, rank, one.report(), self.now_s))

    def wait(self, for_s: float) -> None:
        self.now_s += for_s
        self.play(self.experts.tick(self.now_s))

    def live(self, key: GroupKey) -> ExpertMap | None:
        return self.experts.groups[key].live


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    made.start(DECODE)
    return made


def outcomes(cluster: Cluster) -> list[Outcome]:
    return [told.outcome for told in cluster.told if isinstance(told, Ended)]


def test_a_map_goes_live_and_back(cluster: Cluster) -> None:
    cluster.play(cluster.experts.apply(DECODE, OTHER, 0.0))
    assert cluster.live(DECODE) is OTHER and outcomes(cluster) == [Outcome.COMMITTED]
    cluster.play(cluster.experts.apply(DECODE, THIRD, 1.0))
    cluster.play(cluster.experts.rollback(DECODE, 2.0))
    assert cluster.live(DECODE) is OTHER
    assert [each.version for each in cluster.experts.groups[DECODE].history] == [1, 2, 3]


def test_a_rank_that_does_not_stage_ends_it_as_it_was(cluster: Cluster) -> None:
    cluster.deaf = {1}
    cluster.play(cluster.experts.apply(DECODE, OTHER, 0.0))
    cluster.wait(STAGE_TIMEOUT_S)
    assert any(isinstance(told, Alarm) and "ranks [1] did not follow" in told.why for told in cluster.told)
    assert cluster.experts.groups[DECODE].rollout.phase is Phase.ABORTING
    cluster.deaf = set()
    cluster.wait(3.0)
    assert outcomes(cluster) == [Outcome.ABORTED] and cluster.live(DECODE) is START


def test_an_engine_that_takes_no_step_lets_the_watchdog_speak(cluster: Cluster) -> None:
    cluster.steps = False
    cluster.play(cluster.experts.apply(DECODE, OTHER, 0.0))
    assert cluster.experts.groups[DECODE].rollout.phase is Phase.ARMED
    cluster.wait(APPLY_TIMEOUT_S)
    assert isinstance(cluster.told[0], Alarm) and outcomes(cluster) == [Outcome.ABORTED]
    cluster.step(DECODE)
    assert cluster.live(DECODE) is START


def test_groups_of_a_model_change_one_after_the_other(cluster: Cluster) -> None:
    cluster.start(PREFILL)
    cluster.steps = False
    cluster.play(cluster.experts.apply(DECODE, OTHER, 0.0))
    cluster.play(cluster.experts.apply(PREFILL, OTHER, 0.0))
    assert cluster.experts.groups[PREFILL].rollout.phase is Phase.IDLE
    cluster.steps = True
    cluster.step(DECODE)
    cluster.wait(1.0)
    assert cluster.live(DECODE) is cluster.live(PREFILL) is OTHER


def test_a_group_that_starts_again_gets_its_last_map_by_an_ordinary_rollout(cluster: Cluster) -> None:
    cluster.play(cluster.experts.apply(DECODE, OTHER, 0.0))
    cluster.steps = False
    cluster.play(cluster.experts.apply(DECODE, THIRD, 1.0))
    cluster.steps = True
    cluster.start(DECODE, epoch=2)
    assert outcomes(cluster) == [Outcome.COMMITTED, Outcome.LOST] and cluster.live(DECODE) is START
    cluster.wait(1.0)
    assert cluster.live(DECODE) is OTHER
    with pytest.raises(ValueError, match="epoch 1 of decode-0 is over"):
        cluster.start(DECODE, epoch=1)


def test_a_new_scheduler_takes_back_what_it_finds_half_done(cluster: Cluster) -> None:
    one = cluster.ranks[DECODE, 0]
    one.handle(Stage(epoch=1, leader_epoch=1, version=1, placed=OTHER))
    one.handle(Arm(epoch=1, leader_epoch=1, version=1))
    cluster.experts = Experts(leader_epoch=2)
    facts = GroupFacts(epoch=1, ranks=2, layers=1, experts=4, slots=6, expert_bytes=10)
    for rank in range(2):
        report = cluster.ranks[DECODE, rank].report()
        cluster.play(cluster.experts.registered(DECODE, facts, rank, report, (START,), 0.0))
    assert cluster.live(DECODE) is START and one.report().void_version == 1 and one.vote() == (0, 0, 0, 0)
    one.handle(Stage(epoch=1, leader_epoch=1, version=9, placed=OTHER))
    assert one.report().staged_version == 0


def test_pools_count_and_plan_for_themselves(cluster: Cluster) -> None:
    cluster.start(PREFILL)
    hot = {DECODE: np.array([[10.0, 10, 70, 10]]), PREFILL: np.array([[10.0, 10, 10, 70]])}
    for key, counts in hot.items():
        assert cluster.experts.counted(key, 0, 1, 0, 100_000, counts * 1000)
        assert not cluster.experts.counted(key, 0, 2, 1, 100_000, counts)
    cluster.wait(1.0)
    cluster.wait(1.0)
    for key, expert in ((DECODE, 2), (PREFILL, 3)):
        placed = cluster.live(key)
        assert placed is not None and (placed.slots == expert).sum() == 2
        change = cluster.experts.groups[key].history[-1].predicted
        assert change.change is not Change.FULL and change.balance_after > change.balance_before
    assert cluster.live(DECODE) is not cluster.live(PREFILL)


@pytest.mark.parametrize(
    ("key", "placed", "told"),
    [
        (PREFILL, OTHER, "no group of ranks is registered for prefill-0"),
        (DECODE, ExpertMap.shared(3, np.array([[[0, 1], [2, 0]]])), "the map is"),
    ],
)
def test_what_cannot_be_applied_is_refused(cluster: Cluster, key: GroupKey, placed: ExpertMap, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cluster.experts.apply(key, placed, 0.0)
    with pytest.raises(ValueError, match="has had no other map"):
        cluster.experts.rollback(DECODE, 0.0)
    with pytest.raises(ValueError, match="has routed no token yet"):
        cluster.experts.asked(DECODE)


def test_a_group_whose_engine_takes_no_map_says_why(cluster: Cluster) -> None:
    cluster.start(PREFILL, placement_off="vLLM 0.33.0 is not known")
    with pytest.raises(ValueError, match=r"prefill-0 takes no placement: vLLM 0\.33\.0 is not known"):
        cluster.experts.apply(PREFILL, OTHER, 0.0)
    cluster.experts.counted(PREFILL, 0, 1, 0, 100_000, np.array([[9e5, 1, 1, 1]]))
    cluster.wait(30.0)
    assert cluster.told == []
