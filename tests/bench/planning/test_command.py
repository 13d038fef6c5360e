"""The benchmark of planning runs: the core alone, and a real process over gRPC."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.planning import command


def test_it_writes_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PLANS", {1_000: 700})
    file = tmp_path / "plans.json"
    assert command.measure(blocks=20_000, workers=4, rounds=1, seconds=0.5, fronts=2, json=file) == 0
    result = msgspec.json.decode(file.read_bytes())
    (core,) = result["core"]
    # Plans come in whole batches; nothing of the fleet's blocks is lost on the way.
    assert core["prompt_tokens"] == 1_000 and core["plans_per_s"] > 0
    assert 15_000 < core["indexed_blocks"] < 25_000 and core["bytes_per_block"] > 0
    assert 0 < core["p50_us"] <= core["p99_us"] <= core["max_us"]
    assert result["process"]["plans_per_s"] > 0 and result["process"]["not_planned"] == 0


def test_one_worker_plays_no_two_roles() -> None:
    with pytest.raises(ValueError, match="--workers"):
        command.measure(workers=1)
