"""The benchmark of the front door over a real cluster with fake engines, both APIs, as small as it can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.e2e.conftest import Alive

TIMEOUT_S = 240
SIZES = "--rounds 1 --in-flight 4 --requests 8 --streams 4 --bursts 1 --prompt-tokens 64 --step-ms 2"


def test_the_front_door_is_measured_over_both_apis_and_leaves_nothing(alive: Alive, tmp_path: Path) -> None:
    alive.end()
    output, temporary = tmp_path / "out.json", tmp_path / "temporary"
    temporary.mkdir()
    words = ["front-door", "--systems", "baton,baton_grpc", "--json", str(output), *SIZES.split()]
    ran = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows = {row["system"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["baton", "baton_grpc"]
    for row in rows.values():
        assert row["failed"] == 0
        assert row["tokens_per_chunk"] < 1.2
        assert min(row["cpu_ms_per_request"], row["cpu_us_per_token"], row["burst64_ttft_mean_ms"]) > 0
        low, high = row["spread"]["cpu_ms_per_request"]
        assert low == row["cpu_ms_per_request"] == high
    assert rows["baton_grpc"]["cpu_us_per_token_64_in_flight"] > 0
    assert "cpu_us_per_token: baton / dynamo at most 0.8: not measured" in ran.stdout
    assert list(temporary.glob("baton-*")) == []
    assert [one.pid for one in psutil.process_iter(["cmdline"]) if str(temporary) in str(one.info["cmdline"])] == []
