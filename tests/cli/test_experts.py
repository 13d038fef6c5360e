"""`baton experts` on counts in files: plans, advice, pictures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.experts.counts import made
from cli.app import main


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Six layers of counts of prefill, and of decode."""
    for name in ("prefill_1", "decode_1"):
        counts = made(0)[name][:6].astype(int).tolist()
        (tmp_path / f"{name}.json").write_text(json.dumps({"logical_count": counts}))
    return str(tmp_path / "prefill_1.json"), str(tmp_path / "decode_1.json")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["experts", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_says_what_moves_and_gives_the_map(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    prefill, decode = files
    told = said(capsys, "plan", "--counts", decode, "--placed-for", prefill, "--slots", "288")
    assert told["change"] == "incremental" and 0 < told["moves"] <= 32 * 6
    assert told["balance_before"] < told["balance_after"] <= told["bound"]
    assert np.array(told["slots"]).shape == np.array(told["columns"]).shape == (6, 32, 9)
    told = said(capsys, "plan", "--counts", decode, "--slots", "288", "--lost", "2", "--join", "3")
    assert told["ranks"] == 34 and told["moves"] == told["fewest_moves"] > 27 * 6 and told["without_donor"] > 0
    assert main(["experts", "plan", "--counts", decode, "--placed-for", decode, "--slots", "288"]) == 0
    assert "keep" in capsys.readouterr().out


def test_advice_and_a_picture(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefill, decode = files
    told = said(capsys, "advise", "--counts", decode, "--gpus", "64", "--target", "0.97")
    assert [row["slots_per_rank"] for row in told["rows"]] == [4, 5]
    assert main(["experts", "advise", "--counts", decode, "--gpus", "64", "--target", "0.97"]) == 0
    assert "reaches it" in capsys.readouterr().out
    picture = tmp_path / "load.png"
    words = ["show", "--counts", decode, "--placed-for", prefill, "--slots", "288", "--png", str(picture)]
    assert main(["experts", *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 8 and out[1].startswith("     0  ") and "on rank" in out[1] and out[-1].startswith("balance 0.")
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and drawn.width > 900
        assert len(drawn.getcolors(1 << 20) or ()) > 20


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slots", "289"], "slots: 289 do not divide among 32 ranks"),
        (["--gpus", "0"], "do not divide among 0 ranks"),
        (["--slots", "288", "--lost", "99"], "ranks: 32 with 9 slots"),
    ],
)
def test_what_fits_nothing_is_one_sentence(
    words: list[str], told: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experts", "plan", "--counts", files[1], *words]) == 2
    assert told in capsys.readouterr().err
