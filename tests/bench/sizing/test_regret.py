"""The command that asks what a recommended split loses on later traffic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.sizing.regret import regret


def test_every_rate_has_a_recommendation_and_what_it_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "regret.json"
    code = regret(trace="shared-prompt", workers=2, loads="0.5,0.9", requests=80, processes=1, json=output)
    assert code == 0
    rows = json.loads(output.read_text())
    assert len(rows) == 2
    assert all(0.0 <= row["regret"] < 1.0 for row in rows)
    assert rows[1]["rate_rps"] == pytest.approx(rows[0]["rate_rps"] * 0.9 / 0.5)
    assert capsys.readouterr().out.count("recommended") == 2
