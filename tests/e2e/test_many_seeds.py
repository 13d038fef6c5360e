"""Twenty thousand seeds in virtual time, on all cores: what quick tests run in short. A minute and a half on two."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from simulation import chaos, many
from simulation.chaos import ChaosOptions
from simulation.cluster import Topology
from simulation.schedule import FAULT_KINDS
from simulation.seeds import simulate

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SEEDS = 20_000
CHAOS_SEEDS = 24


def test_every_invariant_holds_under_every_seed() -> None:
    outcomes: Counter[str] = Counter()
    broken = []
    for verdict in many.over(simulate, range(SEEDS)):
        outcomes.update(verdict.outcomes)
        if verdict.broken is not None:
            broken.append(verdict)
    assert broken == []
    assert set(outcomes) == {"finished", "failed", "cancelled", "front_died"}, "the faults reach every kind of end"


@pytest.mark.parametrize("schedulers", [1, 2])
def test_nobody_notices_the_whole_schedule_of_many_seeds_of_chaos(schedulers: int) -> None:
    options = ChaosOptions(topology=Topology(prefill=1, decode=2, schedulers=schedulers), kinds=FAULT_KINDS)
    verdicts = many.over(functools.partial(chaos.run, options=options), range(CHAOS_SEEDS))
    assert [verdict for verdict in verdicts if not verdict.passed] == []
