"""Whole replays: hand-offs, what a policy is told, what is counted, and the command."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.app import main
from runtime.process.exit_codes import ExitCode
from scheduler.api.chance import Random
from scheduler.cluster.step_law import LinkLaw
from simulation.replay import generators, report
from simulation.replay.baton_policy import Baton
from simulation.replay.cluster_model import BadClusterModel, ClusterModel, load
from simulation.replay.policy import (
    Decision,
    FirstToken,
    KvChanged,
    LoadReported,
    MakePolicy,
    Policy,
    PolicyEvent,
    Refuse,
    Request,
    RequestArrived,
    RequestEnded,
    Run,
    Tick,
    Wait,
    WorkerRegistered,
)
from simulation.replay.report import Gaps, Outcome, Report, Slo
from simulation.replay.run import BadDecision, Replay, Scenario
from simulation.replay.traces import Arrival, Trace
from tests.simulation.replay.models import KEY_TOKENS, cluster_model


class Scripted:
    """Answers request n with ``answers[n % len]``, and writes down every event."""

    def __init__(self, *answers: tuple[str | None, str] | str) -> None:
        self.answers = answers
        self.events: list[tuple[float, PolicyEvent]] = []

    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        self.events.append((now_s, event))
        if not isinstance(event, RequestArrived):
            return ()
        number = event.request.request_id
        match self.answers[number % len(self.answers)]:
            case (prefill, decode):
                return (Run(number, prefill, decode),)
            case "wait":
                return (Wait(number),)
            case cause:
                assert isinstance(cause, str)
                return (Refuse(number, cause),)

    def of(self, kind: type[PolicyEvent]) -> list[tuple[float, Any]]:
        return [(at_s, event) for at_s, event in self.events if isinstance(event, kind)]


def replay_of(
    arrivals: Sequence[Arrival], policy: Policy, *, prefill: int = 1, decode: int = 1, **changes: Any
) -> Replay:
    trace = Trace(key_tokens=KEY_TOKENS, arrivals=arrivals)
    model = cluster_model(**changes)
    scenario = Scenario(trace=trace, model=model, prefill=prefill, decode=decode, slo=Slo(ttft_s=2.0, itl_s=0.1))
    return Replay(scenario, "scripted", lambda _: policy)


def arrival(at_s: float, tokens: int = 200, output: int = 5, keys: tuple[int, ...] = ()) -> Arrival:
    return Arrival(arrived_s=at_s, prompt_tokens=tokens, output_tokens=output, block_keys=keys)


PAIR = ("prefill-0", "decode-0")
PREFILL_200_S = 0.01 + 0.02 + 1e-7 * 20_000


def test_a_request_is_computed_handed_over_and_decoded() -> None:
    policy = Scripted(PAIR)
    replay = replay_of([arrival(0.0)], policy, message_s=0.001)
    result = replay.run()
    [outcome] = replay.outcomes
    # The question, the plan, the prompt, and the token to the client: four messages.
    assert outcome.first_s == pytest.approx(0.004 + PREFILL_200_S)
    # The front proxy asks the decode worker; 200 tokens take 200 ms over the link, after its latency.
    decode_s = sum(0.011 + 1e-6 * context for context in range(200, 204))
    assert outcome.ended_s == pytest.approx(outcome.first_s + 0.001 + 0.002 + 0.2 + decode_s + 0.001)
    assert (result.moved_tokens, result.spared_tokens) == (200, 0)
    [(at_s, first)] = policy.of(FirstToken)
    assert (at_s, first) == (outcome.first_s, FirstToken(0, 0))
    assert policy.of(RequestEnded) == [(outcome.ended_s, RequestEnded(0, 5, True))]


def test_hand_offs_wait_for_one_another_and_move_only_what_is_missing() -> None:
    keys = (1, 2, 3)
    arrivals = [arrival(0.0, keys=keys), arrival(0.0), arrival(1.0, keys=keys)]
    replay = replay_of(arrivals, Scripted(PAIR))
    result = replay.run()
    first, second, third = replay.outcomes
    # The second hand-off is asked for while the first one has the link for another 0.17 s.
    assert second.first_s - first.first_s == pytest.approx(PREFILL_200_S)
    assert second.ended_s - first.ended_s == pytest.approx(0.2, abs=0.001)
    assert third.cached_tokens == 192
    assert (result.moved_tokens, result.spared_tokens) == (408, 192)


def test_a_request_that_runs_whole_on_decode_is_not_handed_over() -> None:
    replay = replay_of([arrival(0.0)], Scripted((None, "decode-0")), prefill=0)
    result = replay.run()
    assert replay.outcomes[0].first_s == pytest.approx(PREFILL_200_S)
    assert (result.moved_tokens, result.prefill.workers) == (0, 0)


def test_a_single_token_needs_no_hand_off() -> None:
    replay = replay_of([arrival(0.0, output=1)], Scripted(PAIR))
    assert replay.run().moved_tokens == 0
    assert replay.outcomes[0].first_s == replay.outcomes[0].ended_s == pytest.approx(PREFILL_200_S)


def test_a_policy_is_told_what_workers_report_and_no_output_length() -> None:
    policy = Scripted(PAIR)
    replay_of([arrival(at_s, output=100, keys=(1, 2, 3)) for at_s in (0.0, 0.05, 3.0)], policy).run()
    infos = [event.info for _, event in policy.of(WorkerRegistered)]
    assert [(info.worker_id, info.role, info.kv_blocks_total) for info in infos] == [
        ("prefill-0", "prefill", 1000),
        ("decode-0", "decode", 1000),
    ]
    for worker in ("prefill-0", "decode-0"):
        times = [at_s for at_s, event in policy.of(LoadReported) if event.worker_id == worker]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert min(gaps) > 0.09, "at most every 0.1 s"
        assert max(gaps) < 1.11, "at least every second, or as soon as it looks"
        stored = [event.stored for _, event in policy.of(KvChanged) if event.worker_id == worker]
        assert stored == [(1, 2, 3)]
    steps = [step for _, event in policy.of(LoadReported) for step in event.steps]
    assert any(step.prefill_tokens == 200 for step in steps)
    assert any(step.decode_requests == 2 for step in steps)
    assert policy.of(Tick)
    requests = [event.request for _, event in policy.of(RequestArrived)]
    assert {each.output_tokens_max for each in requests} == {2048}
    assert not {"output_tokens"} & set(Request.__struct_fields__)


def test_a_worker_reports_a_hand_off_that_was_over_between_two_reports() -> None:
    policy = Scripted(PAIR)
    link = LinkLaw(gigabytes_per_s=1e6)
    replay_of([arrival(0.5 * number, tokens=20) for number in range(4)], policy, link=link, prefill=1).run()
    reports = [
        (at_s, event.load)
        for at_s, event in policy.of(LoadReported)
        if event.worker_id == "prefill-0" and event.load.kv_bytes_out
    ]
    assert [load.kv_bytes_out for _, load in reports[:3]] == [20_000_000, 40_000_000, 60_000_000]
    assert not any(load.requests_running or load.prefill_tokens_queued for _, load in reports)
    assert reports[2][0] < 1.2


def test_a_little_more_kv_of_the_same_requests_waits_for_the_heartbeat() -> None:
    policy = Scripted((None, "decode-0"))
    replay_of([arrival(0.05, output=400)], policy).run()
    reports = [(at_s, event.load) for at_s, event in policy.of(LoadReported) if event.worker_id == "decode-0"]
    decoding = [(at_s, load.kv_blocks_used) for at_s, load in reports if load.requests_running]
    assert len(decoding) >= 5
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(decoding)]
    assert gaps[1:] == pytest.approx([1.0] * len(gaps[1:]))
    assert all(earlier[1] < later[1] for earlier, later in itertools.pairwise(decoding))


def test_what_is_refused_too_large_or_never_placed_is_counted_as_such() -> None:
    arrivals = [arrival(0.0)] * 2 + [arrival(at_s) for at_s in range(18)]
    arrivals[5] = arrival(3.0, tokens=17_000)
    policy = Scripted(PAIR, "full", "wait", *[PAIR] * 17)
    result = replay_of(arrivals, policy).run()
    # The first tenth, two of twenty, is not counted.
    assert (result.requests, result.failed, result.unfinished, result.refused) == (18, 1, 1, {})
    assert result.attainment == pytest.approx(16 / 18)
    assert result.goodput_rps == pytest.approx(16 / 17)
    assert [event.finished for _, event in policy.of(RequestEnded)].count(False) == 1


@pytest.mark.parametrize(
    "answer", [("decode-0", "decode-0"), ("prefill-0", "prefill-0"), (None, "decode-9"), ("prefill-7", "decode-0")]
)
def test_a_pair_that_is_none_is_an_error_of_the_policy(answer: tuple[str | None, str]) -> None:
    with pytest.raises(BadDecision, match="no such pair"):
        replay_of([arrival(0.0)], Scripted(answer)).run()


class Insisting(Scripted):
    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        return [*super().handle(event, now_s), *super().handle(event, now_s)]


def test_a_request_is_decided_once() -> None:
    with pytest.raises(BadDecision, match="request 0 is decided already"):
        replay_of([arrival(0.0)], Insisting(PAIR)).run()


# Baton's own policy


def made(
    seed: int = 0, rate: float = 6.0, model: ClusterModel | None = None, make: MakePolicy = Baton
) -> tuple[Report, Replay]:
    trace = generators.made("multi-turn", 600, per_s=rate, seed=7)
    model = model or cluster_model(noise=0.05, kv_blocks_total=2048, kv_bytes_per_token=100_000)
    scenario = Scenario(trace=trace, model=model, prefill=2, decode=2, seed=seed)
    replay = Replay(scenario, "baton", make)
    return replay.run(), replay


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, again, other = (msgspec.json.encode(made(seed)[0]) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_no_token_is_lost_under_pressure() -> None:
    # Without a look at what workers hold.
    policy = Scripted(PAIR, ("prefill-1", "decode-1"))
    model = cluster_model(noise=0.05, kv_blocks_total=820, kv_bytes_per_token=100_000)
    result, replay = made(1, model=model, make=lambda _: policy)
    ended = [each for each in replay.outcomes if each.end == "finished"]
    assert result.unfinished == result.failed == 0
    assert len(ended) + sum(each.end not in {"finished", "failed"} for each in replay.outcomes) == 600
    assert result.decode.preemptions > 0
    assert all(each.arrived_s < each.first_s <= each.ended_s for each in ended)
    handed_over = sum(each.prompt_tokens for each in ended if not each.whole)
    assert result.moved_tokens + result.spared_tokens == handed_over
    for engine in replay.engines.values():
        assert (engine.pool.used, engine.leases) == (0, 0)
        assert engine.pool.free == engine.pool.blocks_total


def test_the_core_that_decides_is_the_schedulers() -> None:
    cores = []

    def make(rng: Random) -> Policy:
        cores.append(Baton(rng))
        return cores[-1]

    trace = generators.made("shared-prompt", 50, per_s=5.0, seed=1)
    model = cluster_model(kv_blocks_total=4096)
    Replay(Scenario(trace=trace, model=model, prefill=2, decode=2), "baton", make).run()
    [policy] = cores
    policy.core.check()
    assert policy.core.plans_in_flight == 0
    assert {worker.role for worker in policy.core.cluster.workers.values()} == {"prefill", "decode"}


# Reports


def test_good_is_what_kept_both_bounds() -> None:
    model = cluster_model()
    bound_s = 4 * model.idle_prefill_s(10_000)
    assert Slo().ttft_of(10_000, model) == bound_s > 2.0
    assert Slo().ttft_of(10, model) == 2.0

    def outcome(first_s: float, ended_s: float, end: str = "finished") -> bool:
        each = Outcome(1.0, 10, 11)
        each.first_s, each.ended_s, each.end = first_s, ended_s, end
        return each.is_good(Slo(), model)

    assert outcome(3.0, 3.5)
    assert not outcome(3.01, 3.5)
    assert not outcome(3.0, 3.51)
    assert not outcome(3.0, 3.5, "failed")


def test_gaps_are_pooled_within_half_a_percent() -> None:
    gaps = Gaps()
    gaps.add(0.01, 98)
    gaps.add(0.5, 2)
    assert gaps.quantile(0.5) == pytest.approx(0.01, rel=report.GAP_STEP)
    assert gaps.quantile(0.98) == pytest.approx(0.01, rel=report.GAP_STEP)
    assert gaps.quantile(0.99) == pytest.approx(0.5, rel=report.GAP_STEP)
    assert Gaps().quantile(0.99) == 0.0


@pytest.mark.parametrize("text", ["ttft", "ttft=soon", "itl=0", "e2e=1", "ttft=inf"])
def test_a_text_that_is_no_slo_is_refused(text: str) -> None:
    with pytest.raises(report.BadSlo, match=text):
        Slo.parse(text)
    assert Slo.parse("ttft=1,itl=0.02") == Slo(ttft_s=1.0, itl_s=0.02)
    assert Slo.parse("") == Slo()


# Files and the command


def in_file(folder: Path, model: ClusterModel) -> Path:
    file = folder / "model.json"
    file.write_bytes(msgspec.json.encode(model))
    return file


def test_a_cluster_model_says_where_each_value_comes_from(tmp_path: Path) -> None:
    model = cluster_model()
    assert load(in_file(tmp_path, model)) == model
    text = msgspec.json.decode(msgspec.json.encode(model))
    del text["sources"]["step.fixed_s"]
    (tmp_path / "bad.json").write_bytes(msgspec.json.encode(text))
    with pytest.raises(BadClusterModel, match=r"sources says nothing about step\.fixed_s"):
        load(tmp_path / "bad.json")
    with pytest.raises(BadClusterModel, match="cannot be read"):
        load(tmp_path / "none.json")


def test_the_command_prints_the_same_for_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--trace", "agents", "--requests", "40", "--prefill", "1", "--decode", "1"]
    words += ["--profile", str(in_file(tmp_path, cluster_model(kv_blocks_total=8192, noise=0.05)))]
    printed = []
    for _ in range(2):
        assert main([*words, "--json"]) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out
    assert msgspec.json.decode(printed[0].out, type=Report).policy == "baton"
    assert "of 40 requests are over" in printed[0].err
    assert main(words) == 0
    assert "goodput under SLO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--trace", "none.jsonl"], 1, "none.jsonl cannot be read"),
        (["--trace", "agents", "--policy", "best"], ExitCode.BAD_OPTION, "policy: 'best' is none of baton"),
        (["--trace", "agents", "--decode", "0"], ExitCode.BAD_OPTION, "decode: 0 is less than 1"),
        (["--trace", "agents", "--load", "0"], ExitCode.BAD_OPTION, "load: 0"),
        (["--trace", "agents", "--slo", "ttft"], ExitCode.BAD_OPTION, "slo: 'ttft'"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, told: str
) -> None:
    profile = str(in_file(tmp_path, cluster_model()))
    assert main(["simulate", "--profile", profile, *words]) == code
    assert told in capsys.readouterr().err
