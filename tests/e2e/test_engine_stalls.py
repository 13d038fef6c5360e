"""Real processes whose fake engines stop working after some requests: each worker ends itself and is started again."""

from __future__ import annotations

import httpx
import pytest

from tests.e2e.cluster import baton_up, wait_for
from tests.e2e.conftest import FAKE, SERVED, Alive

pytestmark = pytest.mark.timeout(600)

HANGS_AFTER = 4
DEADLINE_S = 60


SETTINGS = (
    f"engine.fake.hangs_after_requests={HANGS_AFTER}",
    "worker.engine_stall_timeout_s=1.5",
    f"front_proxy.deadline_s={DEADLINE_S}",
    "front_proxy.stream_stall_timeout_s=1",
    "front_proxy.prefill_stall_timeout_s=1",
)


def test_engines_that_stop_working_cost_no_request_even_where_there_is_no_spare_one(
    alive: Alive, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arguments = [*FAKE, *(word for setting in SETTINGS for word in ("--set", setting))]
    cluster = alive.get("stalls", "baton", lambda: baton_up(tmp_path_factory.mktemp("stalls"), arguments))
    with httpx.Client(base_url=cluster.url, timeout=DEADLINE_S + 10, trust_env=False) as client:
        for turn in range(2 * HANGS_AFTER + 2):
            body = {"model": SERVED, "prompt": [10 + turn] * 200, "max_tokens": 40, "ignore_eos": True}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["completion_tokens"] == 40

    def restarted() -> bool:
        return any(line["id"] == "decode-0" and line["restarts"] >= 1 for line in cluster.status())

    wait_for(restarted, timeout_s=DEADLINE_S, what="the decode worker was started again", seen=cluster.status)
    assert "the engine stands still" in cluster.logs() and "silent_s=1." in cluster.logs()
    told = (cluster.state_dir / "up.stderr").read_text()
    assert "decode-0 ended with exit code 5" in told
