"""Real processes whose fake engines stop working after some requests: each worker ends itself and is started again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import Endpoint, baton_up, wait_for
from tests.e2e.conftest import SERVED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HANGS_AFTER = 8
DEADLINE_S = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, model_dir: Any) -> Iterator[Endpoint]:
    arguments = [
        "--model", str(model_dir), "--prefill", "1", "--decode", "1",
        "--set", f"engine.served_model_name={SERVED}",
        "--set", "engine.kind=fake",
        "--set", f"engine.fake.hangs_after_requests={HANGS_AFTER}",
        "--set", "worker.engine_stall_timeout_s=1.5",
        "--set", f"front_proxy.deadline_s={DEADLINE_S}",
        "--set", "front_proxy.stream_stall_timeout_s=1",
        "--set", "front_proxy.prefill_stall_timeout_s=1",
    ]  # fmt: skip
    with baton_up(tmp_path_factory.mktemp("stalls") / "state", arguments) as endpoint:
        yield endpoint


def test_engines_that_stop_working_cost_no_request_even_where_there_is_no_spare_one(cluster: Endpoint) -> None:
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
