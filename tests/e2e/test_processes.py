"""Real processes with fake engines: SIGTERM, drain and restart of any part under load, and a clean end.

One cluster serves all tests of this module, in the order of the file: each leaves it whole, and the last one ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import BATON, Endpoint, baton_up, is_alive, left_behind, shared_memory, stop, wait_for
from tests.e2e.conftest import FAKE, SERVED, Alive

pytestmark = pytest.mark.timeout(900)

DEADLINE_S = 20
COMMAND_TIMEOUT_S = 120
# A front proxy imports for ten seconds of CPU, which it may have to share.
RESTART_TIMEOUT_S = 120
CLIENTS = 6
Line = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    arguments = [
        *FAKE, "--prefill", "2", "--decode", "2",
        "--set", "launcher.front_proxies=2",
        "--set", f"front_proxy.deadline_s={DEADLINE_S}",
    ]  # fmt: skip
    endpoint = alive.get("processes", "baton", lambda: baton_up(tmp_path_factory.mktemp("processes"), arguments))
    assert isinstance(endpoint, Endpoint)
    return endpoint


async def _follow(client: httpx.AsyncClient, length: int, tokens: int) -> str:
    """What is wrong with one answer, or nothing; half of them are streams."""
    body = {"model": SERVED, "prompt": [10 + i % 90 for i in range(length)], "max_tokens": tokens, "ignore_eos": True}
    try:
        if length % 2:
            response = await client.post("/v1/completions", json=body)
            found = response.json().get("usage", {}).get("completion_tokens")
        else:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            response = await client.post("/v1/completions", json=body | options)
            counts = re.findall(r'"completion_tokens":(\d+)', response.text)
            found = int(counts[-1]) if counts and "data: [DONE]" in response.text else None
    except httpx.HTTPError as error:
        return repr(error)
    return "" if response.status_code == 200 and found == tokens else f"{response.status_code}: {response.text[-500:]}"


class Load:
    """Clients that ask one request after the other, over every front proxy."""

    def __init__(self) -> None:
        self.answers = 0
        self.answered = asyncio.Event()
        self.problems: list[str] = []
        self.over = False

    async def until(self, more: int) -> None:
        """Wait until so many more answers have come."""
        enough = self.answers + more
        async with asyncio.timeout(DEADLINE_S):
            while self.answers < enough:
                self.answered.clear()
                await self.answered.wait()

    async def run(self, url: str, ordinal: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S + 10, trust_env=False) as client:
            for turn in itertools.count():
                if self.over:
                    return
                length = 20 + (ordinal * 37 + turn * 11) % 180
                if problem := await _follow(client, length, tokens=(5, 40, 120)[turn % 3]):
                    self.problems.append(problem)
                self.answers += 1
                self.answered.set()


@contextlib.asynccontextmanager
async def load_on(cluster: Endpoint) -> AsyncIterator[Load]:
    """Steady load, of which the last requests are waited for."""
    fronts = [line["address"] for line in cluster.status() if line["role"] == "front_proxy"]
    load = Load()
    async with asyncio.TaskGroup() as group:
        for ordinal in range(CLIENTS):
            group.create_task(load.run(f"http://{fronts[ordinal % len(fronts)]}", ordinal))
        try:
            await load.until(CLIENTS)
            yield load
        finally:
            load.over = True


def _baton(cluster: Endpoint, *arguments: str) -> str:
    """What a command says; it must succeed."""
    command = [*BATON, *arguments, "--state-dir", str(cluster.state_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _line(cluster: Endpoint, process_id: str) -> Line:
    return next(line for line in cluster.status() if line["id"] == process_id)


def _wait_whole(cluster: Endpoint, before: Line) -> Line:
    """Wait until ``before`` was started again and every process is ready."""

    def whole() -> bool:
        now = {line["id"]: line for line in cluster.status()}
        again = now[before["id"]]["restarts"] > before["restarts"]
        return again and all(line["state"] == "ready" for line in now.values())

    wait_for(
        whole,
        timeout_s=RESTART_TIMEOUT_S,
        what=f"{before['id']} is back and every process is ready",
        seen=cluster.status,
    )
    after = _line(cluster, before["id"])
    assert after["pid"] != before["pid"]
    assert after["epoch"] != before["epoch"], "an incarnation has an epoch of its own"
    if before["role"] in ("scheduler", "front_proxy"):
        assert after["address"] == before["address"], "it is reached where it was"
    return after


def test_killing_the_front_proxy_frees_what_it_ran(cluster: Endpoint) -> None:
    front = _line(cluster, "front-proxy-1")
    url = f"http://{front['address']}"
    body = {"model": SERVED, "prompt": [20] * 200, "max_tokens": 2000, "ignore_eos": True, "stream": True}

    def read_until_it_breaks() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=DEADLINE_S) as response:
            for seen, _ in enumerate(response.iter_lines()):
                if seen == 3:
                    os.kill(int(front["pid"]), signal.SIGKILL)

    with pytest.raises(httpx.HTTPError):
        read_until_it_breaks()
    # No connection is refused meanwhile: it waits for the successor.
    answer = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 3, "stream": False}, timeout=60)
    assert answer.status_code == 200
    cluster.wait_idle()
    _wait_whole(cluster, front)


async def test_a_stop_signal_to_any_process_under_load_loses_nothing(cluster: Endpoint) -> None:
    async with load_on(cluster) as load:
        for victim in ("prefill-0", "decode-0", "scheduler"):
            target = await asyncio.to_thread(_line, cluster, victim)
            os.kill(int(target["pid"]), signal.SIGTERM)
            await asyncio.to_thread(_wait_whole, cluster, target)
            await load.until(2 * CLIENTS)
    assert load.problems == []
    told = (cluster.state_dir / "up.stderr").read_text()
    assert "error: decode-0 ended with exit code 0; starts again" in told
    cluster.wait_idle()


async def test_a_drained_worker_is_idle_and_stays_up_until_it_is_restarted(cluster: Endpoint) -> None:
    before = _line(cluster, "decode-1")
    async with load_on(cluster) as load:
        said = await asyncio.to_thread(_baton, cluster, "drain", "decode-1", "--timeout-s", str(DEADLINE_S))
        assert said.splitlines()[-1].startswith("decode-1 is idle")
        drained = await asyncio.to_thread(_line, cluster, "decode-1")
        assert (drained["state"], drained["requests_running"], drained["pid"]) == ("draining", 0, before["pid"])
        await load.until(2 * CLIENTS)
        assert (await asyncio.to_thread(_line, cluster, "decode-1"))["requests_running"] == 0
        await asyncio.to_thread(_baton, cluster, "restart", "decode-1")
        await asyncio.to_thread(_wait_whole, cluster, before)
    assert load.problems == []


async def test_a_rolling_restart_of_everything_under_load_loses_nothing(cluster: Endpoint) -> None:
    before = cluster.status()
    async with load_on(cluster) as load:
        said = await asyncio.to_thread(_baton, cluster, "restart", "all")
        await load.until(CLIENTS)
    assert load.problems == []
    ready = [line.split(":")[0] for line in said.splitlines() if "ready again" in line]
    assert ready == [
        "scheduler", "prefill-0", "prefill-1", "decode-0", "decode-1", "front-proxy-0", "front-proxy-1",
    ]  # fmt: skip
    for line in before:
        _wait_whole(cluster, line)
    cluster.wait_idle()


def test_an_interrupt_ends_every_process_with_exit_code_zero(cluster: Endpoint) -> None:
    pids = [int(process["pid"]) for process in cluster.status()]
    memory = shared_memory(cluster.process)
    assert stop(cluster.process) == 0
    assert not any(is_alive(pid) for pid in pids)
    assert left_behind(memory) == set()
    assert "never retrieved" not in cluster.logs()
