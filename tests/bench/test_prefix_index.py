"""The benchmark of the prefix index runs, and its queries find what was stored."""

from __future__ import annotations

import json

import pytest

from bench.prefix_index import measure


def test_it_prints_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cbor2")
    assert measure(blocks=10_000, workers=4) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["key_us_per_1000_tokens"]) == {"16", "32", "512"}
    assert len(printed["query_us"]) == 6 and all(time_us > 0 for time_us in printed["query_us"].values())
