"""Chaos in virtual time: the schedule of `baton chaos`, every kind on every role, unnoticed with a spare of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import real_run, virtual_run
from chaos.schedule import AFTER_REQUESTS_MAX, FAULT_KINDS, FaultKind, Lengths, schedule
from chaos.virtual_run import ChaosOptions
from cli.app import main
from front_proxy.dispatch import request_driver
from launcher.config import BatonConfig
from launcher.local.process_plan import plan
from runtime.configuration import load
from simulation.faults.cluster import Topology
from simulation.faults.fault_kinds import Target
from tests.simulation.test_core_seeds import NeverResumes

SPARES = Topology(prefill=1, decode=2)


@pytest.mark.parametrize("schedulers", [1, 2])
def test_it_draws_the_schedule_that_baton_chaos_draws(schedulers: int) -> None:
    sets = ["launcher.prefill=1", "launcher.decode=2", "launcher.front_proxies=2", f"launcher.schedulers={schedulers}"]
    specs = plan(load(BatonConfig, file=None, environ={}, sets=sets).value)
    targets = [Target(spec.id, spec.role) for spec in specs]
    options = ChaosOptions(topology=Topology(prefill=1, decode=2, schedulers=schedulers), kinds=("freeze", "kill"))
    there = schedule(7, targets, ("kill", "freeze"), rounds=1, after_requests_max=AFTER_REQUESTS_MAX)
    assert virtual_run.planned(7, options) == there
    real = real_run.ChaosOptions(state_dir=Path("nowhere"))
    assert (real.users, real.after_requests_max, real.lengths) == (options.users, AFTER_REQUESTS_MAX, Lengths())


@pytest.mark.parametrize(
    "topology", [SPARES, Topology(prefill=2, decode=2), Topology(prefill=1, decode=2, schedulers=2)]
)
def test_nobody_notices_any_kind_of_fault_of_any_process(topology: Topology) -> None:
    options = ChaosOptions(topology=topology, kinds=FAULT_KINDS)
    verdicts = [virtual_run.run(seed, options) for seed in range(3)]
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    assert all(verdict.faults == len(virtual_run.planned(0, options)) for verdict in verdicts)
    assert sum(verdict.counts.repeated for verdict in verdicts) > 0, "front proxies end under requests"


def test_a_seed_repeats_itself() -> None:
    options = ChaosOptions(kinds=FAULT_KINDS)
    assert virtual_run.run(3, options, telling=True) == virtual_run.run(3, options, telling=True)


def test_without_a_spare_decode_worker_clients_notice_and_every_invariant_holds() -> None:
    alone = Topology(prefill=1, decode=1)
    options = ChaosOptions(topology=alone, kinds=FAULT_KINDS, roles=("decode",))
    verdict = virtual_run.run(4, options)
    assert not verdict.passed and verdict.counts.failed > 0 and verdict.broken == ""


@pytest.mark.parametrize("kind", ["kill", "freeze"])
def test_a_planted_bug_is_noticed(kind: FaultKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_driver, "RequestFlow", NeverResumes)
    assert not all(virtual_run.run(seed, ChaosOptions(kinds=(kind,))).passed for seed in range(5))


def test_the_command_prints_the_schedule_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "virtual", "--prefill", "1", "--decode", "2", "--faults", "kill,freeze", "--seed", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = virtual_run.planned(7, ChaosOptions(kinds=("kill", "freeze")))[0]
    assert lines[0] == f"{first.kind} {first.process_id} after {first.after_requests} requests"
    assert lines[-1] == "passed (seed 7, 12 faults)"


def test_the_command_runs_many_seeds_and_refuses_words_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "virtual", "--seeds", "3"]) == 0
    assert capsys.readouterr().out.startswith("3 seeds passed: 18 faults")
    assert main(["chaos", "virtual", "--faults", "flood"]) == 2
