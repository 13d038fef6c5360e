"""`baton up` is killed with -9: its processes end by themselves, and leave nothing in the temporary folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import baton_up, is_alive, wait_for
from tests.e2e.conftest import SERVED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

END_TIMEOUT_S = 30


def test_killing_the_launcher_leaves_no_process_and_no_folder(tmp_path: Path, model_dir: Path) -> None:
    arguments = ["--model", str(model_dir), "--set", "engine.kind=fake", "--set", f"engine.served_model_name={SERVED}"]
    # What it leaves in its temporary folder is looked at when this ends.
    with baton_up(tmp_path / "state", arguments) as baton:
        body = {"model": SERVED, "prompt": [10] * 50, "max_tokens": 5}
        assert httpx.post(f"{baton.url}/v1/completions", json=body, timeout=60).status_code == 200
        pids = [process["pid"] for process in baton.status()]
        assert len(pids) == 4
        os.kill(baton.process.pid, signal.SIGKILL)
        assert baton.process.wait(END_TIMEOUT_S) == -signal.SIGKILL
        wait_for(lambda: not any(map(is_alive, pids)), timeout_s=END_TIMEOUT_S, what="every process has ended")
