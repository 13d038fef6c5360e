"""Two thousand seeds, and an hour past the capacity in virtual time. ``make prove`` runs twenty thousand."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter

import pytest

from chaos import virtual_run
from chaos.schedule import FAULT_KINDS
from chaos.virtual_run import ChaosOptions
from simulation.faults.cluster import Topology
from simulation.faults.seeds import simulate
from simulation.kernel import parallel

pytestmark = pytest.mark.timeout(900)

SEEDS = 2_000
CHAOS_SEEDS = 24


def test_every_invariant_holds_under_every_seed() -> None:
    outcomes: Counter[str] = Counter()
    broken = []
    for verdict in parallel.over(simulate, range(SEEDS)):
        outcomes.update(verdict.outcomes)
        if verdict.broken is not None:
            broken.append(verdict)
    assert broken == []
    assert set(outcomes) == {"finished", "failed", "cancelled", "front_died"}, "the faults reach every kind of end"


@pytest.mark.parametrize("schedulers", [1, 2])
def test_nobody_notices_the_whole_schedule_of_many_seeds_of_chaos(schedulers: int) -> None:
    options = ChaosOptions(topology=Topology(prefill=1, decode=2, schedulers=schedulers), kinds=FAULT_KINDS)
    verdicts = parallel.over(functools.partial(virtual_run.run, options=options), range(CHAOS_SEEDS))
    assert [verdict for verdict in verdicts if not verdict.passed] == []


def test_everything_holds_for_an_hour_at_three_times_the_capacity() -> None:
    # A process of its own: what earlier tests left free would take a leak up.
    command = [sys.executable, "-m", "simulation", "overload", "--hours", "1", "--load", "3"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.endswith("past capacity everything holds\n")
