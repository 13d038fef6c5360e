"""Chaos in virtual time: the schedule of `baton chaos`, every kind on every role; with spares no client notices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from chaos import real_run, virtual_run
from chaos.schedule import FAULT_KINDS, FaultKind, schedule
from chaos.virtual_run import ChaosOptions
from cli.app import main
from front_proxy.planning.plan_client import PlanClient
from front_proxy.request.events import FlowEvent, WorkerFailed
from front_proxy.request.flow import RequestFlow
from launcher.config import BatonConfig
from launcher.hosted.process_plan import plan
from runtime.configuration import load
from scheduler.core import SchedulerCore
from simulation.faults.cluster import Topology
from tests.simulation.test_planted_bugs import Patch, never_resumes, replace, with_events

SPARES = Topology(prefill=1, decode=2)


@pytest.mark.parametrize("schedulers", [1, 2])
def test_it_draws_the_schedule_that_baton_chaos_draws(schedulers: int) -> None:
    sets = ["launcher.prefill=1", "launcher.decode=2", "launcher.front_proxies=2", f"launcher.schedulers={schedulers}"]
    specs = plan(load(BatonConfig, file=None, environ={}, sets=sets).value)
    options = ChaosOptions(topology=Topology(prefill=1, decode=2, schedulers=schedulers), kinds=("freeze", "kill"))
    there = schedule(7, [spec.id for spec in specs], ("kill", "freeze"), rounds=1)
    assert virtual_run.planned(7, options) == there
    real = real_run.ChaosOptions(state_dir=Path("nowhere"))
    assert (real.users, real.lengths) == (options.users, options.lengths)


@pytest.mark.parametrize(
    ("seed", "topology"),
    list(enumerate([SPARES, Topology(prefill=2, decode=2), Topology(prefill=1, decode=2, schedulers=2)])),
)
def test_no_client_notices_any_kind_of_fault_of_any_process(topology: Topology, seed: int) -> None:
    """``make prove`` runs 64 seeds."""
    options = ChaosOptions(topology=topology, kinds=FAULT_KINDS)
    verdict = virtual_run.run(seed, options)
    assert verdict.passed, verdict
    assert verdict.faults == len(virtual_run.planned(0, options))
    assert verdict.counts.repeated > 0, "front proxies end under requests"


def test_a_seed_repeats_itself_and_hits_everything_once_a_round() -> None:
    options = ChaosOptions(kinds=("kill", "cut"), rounds=2)
    assert virtual_run.run(3, options, event_log=True) == virtual_run.run(3, options, event_log=True)
    faults = virtual_run.planned(3, options)
    hits = Counter((fault.kind, fault.process_id) for fault in faults)
    assert len(hits) == 2 * len(options.topology.roles()) and set(hits.values()) == {2}
    assert faults != virtual_run.planned(4, options)


def test_without_a_spare_decode_worker_clients_notice_and_every_invariant_holds() -> None:
    alone = Topology(prefill=1, decode=1)
    options = ChaosOptions(topology=alone, kinds=FAULT_KINDS, roles=("decode",))
    # Most requests wait until it is back: one seed in some sixteen has a client that notices, from 18 on today.
    for seed in range(18, 218):
        verdict = virtual_run.run(seed, options)
        assert verdict.broken == "" and verdict.passed == (not verdict.counts.failed)
        if verdict.counts.failed:
            return
    pytest.fail("no client of 200 seeds noticed")


@pytest.mark.parametrize("kind", ["kill", "freeze"])
def test_a_stream_that_is_given_up_with_its_worker_is_noticed(kind: FaultKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestFlow, "_attempt_failed", never_resumes)
    assert not all(virtual_run.run(seed, ChaosOptions(kinds=(kind,))).passed for seed in range(5))


def reached(_flow: RequestFlow, event: FlowEvent) -> FlowEvent:
    if isinstance(event, WorkerFailed):
        return replace(event, failure=replace(event.failure, reached=True))
    return event


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param((PlanClient, "_may_wait", lambda *_: False), id="nothing waits for a scheduler that is away"),
        pytest.param(with_events(RequestFlow, reached), id="workers count as reached"),
    ],
)
def test_a_front_proxy_that_is_cut_off_and_gives_its_streams_up_is_noticed(
    patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*patch)
    assert not virtual_run.run(0, ChaosOptions(kinds=("cut",), roles=("front_proxy",))).passed


def test_a_scheduler_that_hears_no_worker_and_does_not_doubt_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SchedulerCore, "_doubt", lambda _core, _now_s: None)
    options = ChaosOptions(kinds=("blackhole",), roles=("scheduler",))
    assert "does not doubt itself" in virtual_run.run(0, options).broken


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
