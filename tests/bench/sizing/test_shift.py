"""The command that compares fixed splits with changing roles."""

from __future__ import annotations

import json
from pathlib import Path

from bench.sizing.shift import shift


def test_every_fixed_split_is_beside_the_live_one(tmp_path: Path) -> None:
    output = tmp_path / "shift.json"
    assert shift(workers=2, span_s=20.0, json=output) == 0
    rows = json.loads(output.read_text())
    assert [row["name"] for row in rows[:2]] == ["2 together", "1P1D"]
    assert rows[2]["name"].startswith("live, from ")


def test_a_steady_load_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "shift.json"
    assert shift(workers=6, span_s=20.0, steady=True, json=output) == 0
    assert json.loads(output.read_text())[-1]["flips"] == 0
