"""Past its capacity the cluster does as much as at its best, fairly, and the urgent first: the hour's run in short."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import msgspec
import pytest

from scheduler.api.events import PlanRequested
from simulation.__main__ import main
from simulation.overload.burst import judge
from simulation.overload.model import ALL_INTERACTIVE, Asked, Overload, Report, memory_kib, verdict

SHORT_S = 90.0


@pytest.fixture(scope="module")
def calm() -> list[Report]:
    return [Overload(0, load).run(SHORT_S) for load in (1.0, 1.5)]


@pytest.mark.parametrize("load", [3.0, 6.0])
def test_far_past_its_capacity_everything_holds(calm: list[Report], load: float) -> None:
    heavy = Overload(0, load).run(SHORT_S)
    assert verdict([*calm, heavy]) == []
    assert heavy.outcomes["wait_too_long"] > heavy.outcomes["waited_out"], "most that cannot be served are told at once"
    assert heavy.waiting_most < 1000


@pytest.mark.parametrize("load", [3.0, 6.0])
def test_nothing_but_interactive_requests_past_capacity_are_served_in_time_or_refused(load: float) -> None:
    calm = Overload(0, 1.0, ALL_INTERACTIVE).run(SHORT_S)
    heavy = Overload(0, load, ALL_INTERACTIVE).run(SHORT_S)
    assert verdict([calm, heavy]) == []
    # What a prediction errs by, where it fills a class's whole time to first token.
    assert heavy.outcomes.get("finished late", 0) <= 0.005 * heavy.outcomes["finished"]


class NamesNoKey(Overload):
    """Takes all keys for one."""

    def question(self, plan_id: int, asked: Asked) -> PlanRequested:
        return msgspec.structs.replace(super().question(plan_id, asked), tenant="")


class TakesAllForBatch(Overload):
    """Knows no classes."""

    def question(self, plan_id: int, asked: Asked) -> PlanRequested:
        return msgspec.structs.replace(super().question(plan_id, asked), priority_class="batch")


@pytest.mark.parametrize(("bug", "found"), [(NamesNoKey, "fair share"), (TakesAllForBatch, "TTFT")])
def test_a_planted_bug_is_found(calm: list[Report], bug: type[Overload], found: str) -> None:
    assert any(found in each for each in verdict([*calm, bug(0, 3.0).run(SHORT_S)]))


class NamesNoLength(Overload):
    """One key leaves open how long its answers may be, and gets short ones."""

    def question(self, plan_id: int, asked: Asked) -> PlanRequested:
        question = super().question(plan_id, asked)
        return msgspec.structs.replace(question, output_tokens_max=512) if asked.key == "b" else question


def test_a_key_that_names_no_length_gets_its_share_of_what_is_given() -> None:
    assert NamesNoLength(0, 3.0).run(SHORT_S).fair_shares["b"] > 0.97


def test_memory_and_goodput_are_judged(calm: list[Report]) -> None:
    last = msgspec.structs.replace(calm[-1], memory_growth_kib=1 << 20, goodput_tokens_per_s=1.0)
    assert [each.split()[0] for each in verdict([*calm, last])] == ["goodput", "memory"]


class Leaks(Overload):
    """Keeps something of every request."""

    def __init__(self, seed: int, load: float) -> None:
        super().__init__(seed, load)
        self._kept: list[bytes] = []

    def question(self, plan_id: int, asked: Asked) -> PlanRequested:
        self._kept.append(bytes(10_000))
        return super().question(plan_id, asked)


def _leak_after_a_peak() -> Report:
    before_kib = memory_kib()
    needed = bytearray(b"x" * (64 << 20))
    assert memory_kib() > before_kib + (32 << 10)
    del needed
    return Leaks(0, 3.0).run(SHORT_S)


def test_a_leak_is_found_in_a_process_that_once_needed_more(calm: list[Report]) -> None:
    # A process of its own: what other tests have freed in this one would take up the whole leak.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        leaking = processes.submit(_leak_after_a_peak).result(timeout=60.0)
    assert [each.split()[0] for each in verdict([*calm, leaking])] == ["memory"]


@pytest.mark.parametrize("seed", [0, 1])
def test_after_a_burst_clients_that_come_back_as_told_are_served_within_five_tries(seed: int) -> None:
    assert judge(seed) == []


def test_clients_that_are_told_to_come_back_at_once_are_refused_five_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.queueing.refusals.retry_after_s", lambda *_, **__: 0.1)
    assert judge(0) != []


def test_everything_holds_for_a_quarter_of_an_hour_at_three_times_the_capacity() -> None:
    """``make prove`` runs the hour."""
    # A process of its own: what earlier tests left free would take a leak up.
    command = [sys.executable, "-m", "simulation", "overload", "--hours", "0.25", "--load", "3", "--short-s", "90"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "mixed, load 3: goodput" in told.stdout and "all interactive, load 3: goodput" in told.stdout
    assert "burst: " in told.stdout
    assert told.stdout.endswith("past capacity everything holds\n")


def test_the_command_fails_when_something_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulation.overload.model.GOODPUT_MIN", 2.0)
    assert main(["overload", "--hours", "0.002", "--short-s", "6", "--load", "2.5"]) == 1
    assert "BROKEN mixed: goodput fell" in capsys.readouterr().out
