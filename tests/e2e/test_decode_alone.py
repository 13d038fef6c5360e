"""A cluster without prefill workers serves as one plain engine does, and ends with a launcher that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from launcher.local import procfs
from tests.e2e.cluster import baton_up, wait_for
from tests.e2e.conftest import FAKE, SERVED, Alive

pytestmark = pytest.mark.timeout(300)

END_TIMEOUT_S = 30


def test_decode_workers_alone_serve_and_killing_the_launcher_leaves_no_process_and_no_folder(
    alive: Alive, tmp_path: Path
) -> None:
    alive.end()
    # What it leaves in its temporary folder is looked at when this ends.
    with baton_up(tmp_path / "state", [*FAKE, "--prefill", "0", "--decode", "1"]) as cluster:
        lines = cluster.status()
        assert [line["role"] for line in lines] == ["scheduler", "decode", "front_proxy"]
        for tokens in (1, 5):
            body = {"model": SERVED, "prompt": [20] * 200, "max_tokens": tokens, "ignore_eos": True}
            answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == tokens
        pids = [line["pid"] for line in lines]
        os.kill(cluster.process.pid, signal.SIGKILL)
        assert cluster.process.wait(END_TIMEOUT_S) == -signal.SIGKILL
        wait_for(lambda: not any(map(procfs.facts, pids)), timeout_s=END_TIMEOUT_S, what="every process has ended")
