"""`baton chaos` on fake engines and two schedulers, one of which is killed, frozen or restarted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_chaos import ONE_FRONT, alone, chaos  # noqa: F401 - a fixture

pytestmark = pytest.mark.timeout(400)


def test_two_schedulers_survive_whatever_befalls_one_of_them(tmp_path: Path) -> None:
    code, report, said = chaos(
        tmp_path, "--prefill", "1", "--decode", "1", *ONE_FRONT, "--faults", "kill,freeze,restart",
        "--freeze-s", "15", "--seed", "5", "--roles", "scheduler", "--set", "launcher.schedulers=2",
    )  # fmt: skip
    assert code == 0, said
    assert len(report["faults"]) == 6
    assert "0 failed, 0 with wrong answers" in said
    # A frozen one keeps its lock, and no other one can lead before it is dead.
    assert said.count("has not answered for 10 s: killing it") == 2
    logs = "".join(log.read_text() for log in (tmp_path / "state" / "logs").glob("scheduler-*.log"))
    assert logs and "it led once, and another one leads now" not in logs, "no process saw two leaders"
