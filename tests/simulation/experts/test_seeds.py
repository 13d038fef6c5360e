"""Rollouts under faults hold for two thousand seeds, and planted bugs are found within five hundred."""

from __future__ import annotations

from typing import Any

import pytest

from engine.expert_rank import ExpertRank, Stage
from scheduler.experts import groups
from scheduler.experts.groups import Experts
from scheduler.experts.rollout import Phase, Rollout
from simulation.__main__ import main
from simulation.experts.seeds import simulate

SEEDS = 2_000
# So that several processes share them.
SEEDS_A_TEST = 200
SEEDS_TO_FIND_A_BUG = 500


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_every_rollout_is_committed_or_as_it_was_under_every_seed(first: int) -> None:
    verdicts = [simulate(seed) for seed in range(first, first + SEEDS_A_TEST)]
    assert [verdict for verdict in verdicts if verdict.broken is not None] == []
    assert {"committed", "aborted", "lost", "alarm"} <= {name for verdict in verdicts for name in verdict.outcomes}
    assert sum(verdict.applied for verdict in verdicts) > SEEDS_A_TEST * 4


def test_a_seed_repeats_itself() -> None:
    for seed in range(10):
        assert simulate(seed, event_log=True) == simulate(seed, event_log=True)


def test_the_command_runs_many_seeds_and_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "--seeds", "5"]) == 0
    assert capsys.readouterr().out.startswith("5 seeds held")
    assert main(["experts", "--seed", "3"]) == 0
    assert "'Arm'" in capsys.readouterr().out


def arm_before_all_have_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = Rollout._reached
    monkeypatch.setattr(Rollout, "_reached", lambda self, rank: self.phase is Phase.STAGING or reached(self, rank))


def stage_an_older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(self: Any, command: Stage) -> None:
        self._staged, self._armed = command, False

    monkeypatch.setattr(ExpertRank, "_stage", stage)


def count_the_other_pool_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(self: Any, key: Any, rank: int, epoch: int, sequence: int, tokens: int, counts: Any) -> bool:
        for group in self.groups.values():
            group.statistics.add(rank, sequence, tokens, counts)
        return True

    monkeypatch.setattr(Experts, "counted", counted)


def apply_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def agreed(self: Any, reduced: Any) -> Any:
        return self._staged.placed if self._staged is not None and self._armed else None

    monkeypatch.setattr(ExpertRank, "agreed", agreed)


def forget_the_last_map_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_lost_map", lambda group: None)


def end_before_every_rank_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = Rollout._reached
    monkeypatch.setattr(Rollout, "_reached", lambda self, rank: self.phase is Phase.ABORTING or reached(self, rank))


def never_send_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.experts.rollout.RESEND_S", float("inf"))


@pytest.mark.parametrize(
    "plant",
    [
        arm_before_all_have_staged,
        stage_an_older_version,
        count_the_other_pool_too,
        apply_without_the_others,
        forget_the_last_map_of_a_group,
        end_before_every_rank_has_answered,
        never_send_again,
    ],
)
def test_a_planted_bug_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(simulate(seed).broken for seed in range(SEEDS_TO_FIND_A_BUG)), "no seed finds it"
