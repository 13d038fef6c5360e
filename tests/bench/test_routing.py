"""``python -m bench routing`` from a trace file to its results, on a trace small enough for a test."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from bench.__main__ import main
from bench.routing.command import DEFAULT_PROFILE
from bench.routing.runs import ALL_POLICIES, Job, Setup, measure
from runtime.process.exit_codes import ExitCode
from simulation.replay.report import Slo


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """200 requests of 20 conversations in 100 s, in Mooncake's format."""
    rng = random.Random(1)
    lines, turns = [], [0] * 20
    for number in range(200):
        who = rng.randrange(20)
        turns[who] += 4
        keys = [who * 1000 + index for index in range(turns[who])]
        lines.append(
            {"timestamp": number * 500, "input_length": len(keys) * 512, "output_length": 20, "hash_ids": keys}
        )
    file = tmp_path / "trace.jsonl"
    file.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines))
    return file


def test_every_policy_runs_the_trace_and_the_same_seed_gives_the_same_row(trace: Path) -> None:
    setup = Setup(trace=trace, trace_format=None, profile=DEFAULT_PROFILE, prefill=2, decode=2, slo=Slo())
    hits = {}
    for policy in ALL_POLICIES:
        job = Job(policy=policy, speed=2.0, load=0.5, seed=3)
        first, second = measure(setup, job).row, measure(setup, job).row
        assert msgspec.structs.replace(first, decisions_per_s=0.0) == msgspec.structs.replace(
            second, decisions_per_s=0.0
        )
        assert (first.policy, first.load, first.seed) == (policy, 0.5, 3)
        assert first.decisions_per_s > 0
        hits[policy] = first.hit_tokens
    assert min(hits[policy] for policy in ("dynamo", "llm_d_sticky", "smg", "mooncake")) > hits["round_robin"]


def test_the_command_writes_rows_and_a_plot_and_prints_a_table(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    words = f"routing --trace {trace} --prefill 1 --decode 1 --loads 0.5,1.0 --seeds 2 --slo ttft=2,itl=0.05"
    assert main([*words.split(), "--policies", "baton,mooncake", "--json", str(out), "--plot", str(plot)]) == 0
    rows = msgspec.json.decode(out.read_bytes())["rows"]
    assert [(row["policy"], row["load"], row["seed"]) for row in rows] == [
        (policy, load, seed) for load in (0.5, 1.0) for policy in ("baton", "mooncake") for seed in (0, 1)
    ]
    at_one = [row["attainment"] for row in rows if (row["policy"], row["load"]) == ("mooncake", 1.0)]
    assert sum(at_one) / 2 >= 0.9
    assert plot.stat().st_size > 1000
    assert "load 1.0 is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--loads", "0.5,x", "loads: '0.5,x' is not a list"),
        ("--policies", "batn", "policies: there is no batn"),
        ("--policies", "baton", "none of them is a peer's"),
    ],
)
def test_a_bad_option_is_named(
    trace: Path, option: str, value: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["routing", "--trace", str(trace), option, value]) == ExitCode.BAD_OPTION
    assert why in " ".join(capsys.readouterr().err.split())
