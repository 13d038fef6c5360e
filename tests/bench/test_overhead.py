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
        tokens_per_chunk=2.5,
        latency={},
        throughput={"output_throughput": 100.0},
        warmup_failed=0,
        errors=errors,
    )


def ratios(*visits: Visit) -> tuple[float, ...]:
    found = {(one.measure, one.system, one.over): one for one in compare(visits)}
    return found["ttft_median_ms", "baton", "plain"].rounds


def told(*visits: Visit, model: str = "demo") -> str:
    systems = tuple(one.system for one in visits)
    return text(build(OverheadSpec(systems=systems, rounds=1), EngineShape(model=model), visits, environment(), ""))


def test_each_round_begins_with_another_system() -> None:
    orders = [order_of(("plain", "router", "baton"), index) for index in range(4)]
    assert [order[0] for order in orders] == ["plain", "router", "baton", "plain"]
    assert all(set(order) == {"plain", "router", "baton"} for order in orders)


def test_systems_stay_up_together_only_when_their_engines_fit() -> None:
    assert side_by_side(OverheadSpec(systems=("plain", "baton")))
    assert not side_by_side(OverheadSpec(systems=("plain", "router", "baton")))


def test_systems_are_compared_within_the_rounds_in_which_both_have_a_value() -> None:
    first, second = visit("plain", 0, 10.0), visit("plain", 1, 20.0)
    assert ratios(first, visit("baton", 0, 11.0), second, visit("baton", 1, 24.0)) == pytest.approx((1.1, 1.2))
    assert ratios(first, visit("baton", 0, 0.0), second, visit("baton", 1, 30.0)) == (1.5,)


def test_the_report_says_which_targets_were_kept_and_shows_failures() -> None:
    baton = visit("baton", 0, 12.0, other_s=1.5, errors=("HTTP 503: no workers",))
    all_three = told(visit("plain", 0, 10.0), visit("router", 0, 17.0, other_s=3.0), baton, model="some/where/demo")
    assert "baton / plain at most 1.05: MISSED" in all_three
    assert "baton / router at most 0.5: kept" in all_three
    assert "HTTP 503: no workers" in all_three
    assert " 2.50 " in all_three
    assert "some/where" not in all_three
    assert "baton / router at most 0.5: not measured" in told(visit("plain", 0, 10.0), visit("baton", 0, 11.0))


def test_an_earlier_commit_is_started_by_its_own_entry_and_held_to_its_own_bound(tmp_path: Path) -> None:
    assert earlier_command(tmp_path)[1:] == ["-m", "launcher.cli"]
    (tmp_path / "cli").mkdir()
    assert earlier_command(tmp_path)[1:] == ["-m", "cli"]
    own = tmp_path / ".venv" / "bin" / "baton"
    own.parent.mkdir(parents=True)
    own.touch()
    assert earlier_command(tmp_path) == [str(own)]
    assert earlier_command(tmp_path, "run it") == ["run", "it"]
    both = told(visit("earlier", 0, 10.0), visit("baton", 0, 10.4))
    assert "ttft_median_ms: baton / earlier at most 1.03: MISSED" in both
    assert "output_throughput: earlier / baton at most 1.03: kept" in both


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
