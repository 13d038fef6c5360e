"""Real processes with fake engines: kill -9 of any part, the truth in `baton status`, and a clean end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import Endpoint, baton_up, is_alive, stop, wait_for
from tests.e2e.conftest import SERVED

# The first test of a session also waits for every engine to start.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DEADLINE_S = 20


@pytest.fixture
def cluster(tmp_path: Path, model_dir: Path) -> Iterator[Endpoint]:
    arguments = [
        "--model", str(model_dir), "--prefill", "2", "--decode", "2",
        "--set", f"engine.served_model_name={SERVED}",
        "--set", "engine.kind=fake",
        "--set", f"front_proxy.deadline_s={DEADLINE_S}",
    ]  # fmt: skip
    with baton_up(tmp_path / "state", arguments) as endpoint:
        yield endpoint


async def _ask(client: httpx.AsyncClient, length: int) -> int:
    body = {"model": SERVED, "prompt": [10 + i % 90 for i in range(length)], "max_tokens": 60, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body)
    return response.status_code


@pytest.mark.parametrize("victim", ["prefill", "decode", "scheduler"])
async def test_killing_one_process_under_load_hangs_nobody(cluster: Endpoint, victim: str) -> None:
    before = cluster.status()
    target = next(process for process in before if process["role"] == victim)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=DEADLINE_S + 10) as client:
        load = [asyncio.create_task(_ask(client, 40 + 10 * i)) for i in range(24)]
        await asyncio.wait(load, return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
        os.kill(int(target["pid"]), signal.SIGKILL)
        answers = await asyncio.gather(*load)
        assert all(answer in (200, 502, 503, 504, 500) for answer in answers)
        if victim == "prefill":
            assert answers == [200] * len(load), "a prefill death before the first token is retried on another"

        def truth() -> bool:
            now = {process["id"]: process["state"] for process in cluster.status()}
            return now[target["id"]] == "dead" and all(
                state == "ready" for name, state in now.items() if name != target["id"]
            )

        wait_for(truth, timeout_s=15, what=f"status tells that {target['id']} is dead and the rest is ready")
        assert await _ask(client, 64) == 200, "also without a scheduler: planned from the last view"


def test_killing_the_front_proxy_frees_what_it_ran(cluster: Endpoint) -> None:
    front = next(process for process in cluster.status() if process["role"] == "front_proxy")
    body = {"model": SERVED, "prompt": [20] * 200, "max_tokens": 2000, "ignore_eos": True, "stream": True}

    def read_until_it_breaks() -> None:
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=DEADLINE_S) as response:
            for seen, _ in enumerate(response.iter_lines()):
                if seen == 3:
                    os.kill(int(front["pid"]), signal.SIGKILL)

    with pytest.raises(httpx.HTTPError):
        read_until_it_breaks()

    def idle() -> bool:
        rest = [process for process in cluster.status() if process["role"] in ("prefill", "decode")]
        return all(p["kv_blocks_used"] == 0 and p["leases_held"] == 0 and p["requests_running"] == 0 for p in rest)

    wait_for(idle, timeout_s=10, what="the workers aborted the dead front proxy's requests", seen=cluster.status)


def test_an_interrupt_ends_every_process_with_exit_code_zero(cluster: Endpoint) -> None:
    pids = [int(process["pid"]) for process in cluster.status()]
    assert stop(cluster.process) == 0

    assert not any(is_alive(pid) for pid in pids)
