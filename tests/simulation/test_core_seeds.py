"""Two thousand seeds of the simulation hold, and one seed repeats exactly. ``make prove`` runs twenty thousand."""

from __future__ import annotations

import pytest

from simulation.__main__ import main
from simulation.faults.seeds import simulate

SEEDS = 2_000
# So that several processes share them.
SEEDS_A_TEST = 200


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_every_invariant_holds_under_every_seed(first: int) -> None:
    verdicts = [simulate(seed) for seed in range(first, first + SEEDS_A_TEST)]
    assert [verdict for verdict in verdicts if verdict.broken is not None] == []
    outcomes = [outcome for verdict in verdicts for outcome in verdict.outcomes]
    assert set(outcomes) == {"finished", "failed", "refused", "cancelled", "front_died"}, (
        "the faults reach every kind of end"
    )
    assert sum(verdict.retries for verdict in verdicts) > SEEDS_A_TEST / 4


def test_a_seed_repeats_itself() -> None:
    for seed in range(20):
        assert simulate(seed, event_log=True) == simulate(seed, event_log=True)


def test_the_command_prints_every_event_of_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    told = capsys.readouterr().out
    assert "every invariant held" in told and "planning/1 <- " in told


def test_the_command_runs_many_seeds_on_all_cores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "25", "--first-seed", "100"]) == 0
    assert capsys.readouterr().out.startswith("25 seeds held")
