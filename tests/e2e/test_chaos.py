"""`baton chaos` on fake engines: every process killed, frozen or cut off in turn, unnoticed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chaos.requests import REQUEST_KINDS
from tests.e2e.accounts import canary
from tests.e2e.cluster import BATON
from tests.e2e.conftest import Alive

pytestmark = pytest.mark.timeout(400)


# Front proxies take longest to start; a spare one is needed only where one is replaced.
ONE_FRONT = ("--front-proxies", "1")
QUICK_STALL = ("--set", "front_proxy.stream_stall_timeout_s=1")


@pytest.fixture(autouse=True)
def alone(alive: Alive) -> None:
    alive.end()


def chaos(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    report = tmp_path / "report.json"
    fixed = ["--set", "engine.kind=fake", "--output", str(report)]
    argv = [*BATON, "chaos", "--state-dir", str(tmp_path / "state"), *fixed, *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=380, check=False)
    said = done.stdout + done.stderr
    canary.assert_in_no_file(tmp_path)
    assert canary.keys_in(said) == []
    return done.returncode, json.loads(report.read_text()) if report.exists() else {}, said


def test_a_cluster_with_one_spare_of_each_survives_every_kill_and_freeze(tmp_path: Path) -> None:
    code, report, said = chaos(
        tmp_path, "--prefill", "2", "--decode", "2", *ONE_FRONT, *QUICK_STALL, "--faults", "kill,freeze",
        "--seed", "3", "--freeze-s", "2", "--roles", "scheduler,prefill,decode",
        # One that took longer has failed.
        "--set", "front_proxy.deadline_s=20",
    )  # fmt: skip
    assert code == 0, said
    assert report["passed"] is True
    assert len(report["faults"]) == 10
    assert "0 failed, 0 with wrong answers" in said
    # Nothing is judged by a part of the kinds only: every one is sent, and has one answer.
    assert report["counts"]["left_out"] == {}
    assert set(report["counts"]["kinds"]) == set(REQUEST_KINDS)


def test_whatever_befalls_connections_of_every_process_costs_no_request(tmp_path: Path) -> None:
    kinds = ("cut", "delay", "blackhole")
    code, report, said = chaos(
        tmp_path, "--prefill", "1", "--decode", "2", *ONE_FRONT, *QUICK_STALL, "--faults", ",".join(kinds),
        "--seed", "5", "--cut-s", "0.5", "--delay-s", "0.5", "--blackhole-s", "1.5",
    )  # fmt: skip
    assert code == 0, said
    assert {(fault["kind"], fault["process_id"]) for fault in report["faults"]} == {
        (kind, process_id)
        for kind in kinds
        for process_id in ("scheduler", "prefill-0", "decode-0", "decode-1", "front-proxy-0")
    }
    # At least the stream to the scheduler, or of a worker to it.
    assert all(fault["disturbed"] >= 1 for fault in report["faults"])
    assert "0 failed, 0 with wrong answers, 0 repeated" in said


def test_what_no_cluster_survives_is_told_with_the_last_words_of_what_is_not_back(tmp_path: Path) -> None:
    """The only decode worker: without a spare one requests do fail, and the verdict must say so."""
    code, report, said = chaos(
        tmp_path, "--prefill", "1", "--decode", "1", *ONE_FRONT, "--faults", "kill", "--roles", "decode",
        "--requests", "completion", "--recover-timeout-s", "0.5", "--set", "front_proxy.attempts_max=1",
    )  # fmt: skip
    assert code == 1, said
    assert report["passed"] is False
    assert "FAILED" in said
    assert "is whole again" in report["error"]
    (lost,) = report["not_back"]
    assert lost["state"] in ("restarting", "starting")
    assert lost["log_tail"]
    (fault,) = report["faults"]
    assert (fault["process_id"], fault["recovered_after_s"]) == (lost["process_id"], None)
    assert f"{lost['process_id']} is {lost['state']}" in said
