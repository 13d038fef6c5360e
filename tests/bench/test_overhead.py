"""Comparing visits, and the report made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.overhead import OverheadSpec, Visit, compare, order_of, side_by_side
from bench.peers import EngineShape, SystemName, baton_argv, earlier_command, plain_argv, router_argv
from bench.report import build, environment, text


def visit(system: SystemName, index: int, ttft_ms: float, other_s: float = 1.0, errors: tuple[str, ...] = ()) -> Visit:
    return Visit(
        system=system,
        round=index,
        ttft_median_ms=ttft_ms,
        tpot_median_ms=2.0,
        cpu_other_s_per_1000_tokens=other_s,
        cpu_engine_s_per_1000_tokens=9.0,
        cpu_other_by_process={},
        latency={},
        throughput={"output_throughput": 100.0},
        warmup_failed=0,
        errors=errors,
    )


def test_each_round_begins_with_another_system() -> None:
    orders = [order_of(("plain", "router", "baton"), index) for index in range(4)]
    assert [order[0] for order in orders] == ["plain", "router", "baton", "plain"]
    assert all(set(order) == {"plain", "router", "baton"} for order in orders)


def test_systems_stay_up_together_only_when_their_engines_fit() -> None:
    assert side_by_side(OverheadSpec(systems=("plain", "baton")))
    assert not side_by_side(OverheadSpec(systems=("plain", "router", "baton")))


def test_systems_are_compared_within_rounds() -> None:
    visits = [visit("plain", 0, 10.0), visit("baton", 0, 11.0), visit("plain", 1, 20.0), visit("baton", 1, 24.0)]
    found = {(one.measure, one.system, one.over): one for one in compare(visits)}
    assert found["ttft_median_ms", "baton", "plain"].rounds == pytest.approx((1.1, 1.2))


def test_a_round_without_a_value_is_left_out_of_the_ratio() -> None:
    visits = [visit("plain", 0, 10.0), visit("baton", 0, 0.0), visit("plain", 1, 20.0), visit("baton", 1, 30.0)]
    found = {(one.measure, one.system, one.over): one for one in compare(visits)}
    assert found["ttft_median_ms", "baton", "plain"].rounds == (1.5,)


def test_the_report_says_which_targets_were_kept_and_shows_failures() -> None:
    visits = [
        visit("plain", 0, 10.0),
        visit("router", 0, 17.0, other_s=2.0),
        visit("baton", 0, 12.0, other_s=1.5, errors=("HTTP 503: no workers",)),
    ]
    spec = OverheadSpec(systems=("plain", "router", "baton"), rounds=1)
    told = text(build(spec, EngineShape(model="some/where/demo"), visits, environment(), "0.1.17"))
    assert "baton / plain at most 1.15: MISSED" in told
    assert "baton / router at most 1: kept" in told
    assert "HTTP 503: no workers" in told
    assert "some/where" not in told


def test_a_target_without_its_peer_is_not_claimed() -> None:
    spec = OverheadSpec(systems=("plain", "baton"), rounds=1)
    visits = [visit("plain", 0, 10.0), visit("baton", 0, 11.0)]
    assert "baton / router at most 1: not measured" in text(
        build(spec, EngineShape(model="demo"), visits, environment(), "")
    )


def test_an_earlier_commit_is_started_by_its_own_entry_and_held_to_its_own_bound(tmp_path: Path) -> None:
    assert earlier_command(tmp_path)[1:] == ["-m", "launcher.cli"]
    (tmp_path / "cli").mkdir()
    assert earlier_command(tmp_path)[1:] == ["-m", "cli"]
    own = tmp_path / ".venv" / "bin" / "baton"
    own.parent.mkdir(parents=True)
    own.touch()
    assert earlier_command(tmp_path) == [str(own)]
    assert earlier_command(tmp_path, ["run", "it"]) == ["run", "it"]
    visits = [visit("earlier", 0, 10.0), visit("baton", 0, 10.4)]
    told = text(
        build(
            OverheadSpec(systems=("earlier", "baton"), rounds=1), EngineShape(model="demo"), visits, environment(), ""
        )
    )
    assert "ttft_median_ms: baton / earlier" in told
    assert "ttft_median_ms: baton / earlier at most 1.03: MISSED" in told
    assert "output_throughput: earlier / baton at most 1.03: kept" in told


def test_every_system_is_started_with_engines_of_one_shape() -> None:
    shape = EngineShape(model="demo", max_model_len=777, block_size_tokens=64)
    plain = " ".join(plain_argv(shape, 1))
    assert "--max-model-len 777" in plain
    assert "--block-size 64" in plain
    baton = " ".join(baton_argv(shape, 1, Path("state"), ["a.b=c"]))
    assert "engine.max_model_len=777" in baton
    assert "engine.block_size_tokens=64" in baton
    assert baton.endswith("--set a.b=c")
    assert "--vllm-pd-disaggregation" in router_argv("", 1, "http://p", "http://d", 2)
