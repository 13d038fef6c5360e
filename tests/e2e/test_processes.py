"""Real processes with fake engines: SIGTERM, drain and restart of any part under load, and a clean end.

One cluster serves all tests of this module, in the order of the file: each leaves it whole, and the last one ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from front_proxy.grpc_api.client import BatonClient, BatonError, SamplingOptions, request
from launcher.local import procfs
from tests.e2e.cluster import (
    BATON,
    COMMAND_TIMEOUT_S,
    Endpoint,
    baton_up,
    left_behind,
    metrics,
    shared_memory,
    stop,
    wait_for,
)
from tests.e2e.conftest import FAKE, SERVED, Alive

pytestmark = pytest.mark.timeout(900)

DEADLINE_S = 20
# A front proxy imports for ten seconds of CPU, which it may have to share.
RESTART_TIMEOUT_S = 120
# Over HTTP; and as many over gRPC, one stream each or all on one.
CLIENTS = 6
# All on one of two front proxies: once in 30,000.
STREAMS = 16
Line = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    arguments = [
        *FAKE, "--prefill", "2", "--decode", "2", "--front-proxies", "2",
        "--set", f"front_proxy.deadline_s={DEADLINE_S}",
    ]  # fmt: skip
    return alive.get("processes", "baton", lambda: baton_up(tmp_path_factory.mktemp("processes"), arguments))


async def _follow(client: httpx.AsyncClient, length: int, tokens: int) -> str:
    """What is wrong with one answer, or nothing; half of them are streams."""
    body = {"model": SERVED, "prompt": [10 + i % 90 for i in range(length)], "max_tokens": tokens, "ignore_eos": True}
    streams = length % 2 == 0
    if streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        response = await client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        return repr(error)
    counts = re.findall(r'"completion_tokens":(\d+)', response.text)
    whole = counts[-1:] == [str(tokens)] and ("data: [DONE]" in response.text) is streams
    return "" if response.status_code == 200 and whole else f"{response.status_code}: {response.text[-500:]}"


async def _ask_once(url: str) -> str:
    """What is wrong with one answer on a connection of its own, or nothing."""
    async with httpx.AsyncClient(base_url=url, timeout=RESTART_TIMEOUT_S, trust_env=False) as client:
        return await _follow(client, 21, 3)


async def _complete(client: BatonClient, length: int, tokens: int) -> str:
    """What is wrong with one answer over gRPC, or nothing."""
    sampling = SamplingOptions(max_tokens=tokens, ignore_eos=True)
    try:
        [completion] = await client.complete([10 + i % 90 for i in range(length)], sampling, timeout_s=DEADLINE_S)
    except BatonError as error:
        return f"{error.code}: {error}"
    return "" if len(completion.token_ids) == tokens else f"{len(completion.token_ids)} tokens of {tokens}"


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

    def _sizes(self, ordinal: int) -> Iterator[tuple[int, int]]:
        """Tokens of prompts and of outputs, until it is over."""
        for turn in itertools.count():
            if self.over:
                return
            yield 20 + (ordinal * 37 + turn * 11) % 180, (5, 40, 120)[turn % 3]

    def _note(self, problem: str) -> None:
        if problem:
            self.problems.append(problem)
        self.answers += 1
        self.answered.set()

    async def over_http(self, url: str, ordinal: int) -> None:
        # A new connection may meet a front proxy that is being restarted, and waits for it.
        async with httpx.AsyncClient(base_url=url, timeout=RESTART_TIMEOUT_S, trust_env=False) as client:
            for length, tokens in self._sizes(ordinal):
                self._note(await _follow(client, length, tokens))

    async def over_grpc(self, address: str, ordinal: int) -> None:
        async with BatonClient(address) as client:
            for length, tokens in self._sizes(ordinal):
                self._note(await _complete(client, length, tokens))

    async def on_one_stream(self, address: str, ordinal: int) -> None:
        asked = (
            request([20] * length, SamplingOptions(max_tokens=tokens, ignore_eos=True))
            for length, tokens in self._sizes(ordinal)
        )
        async with BatonClient(address) as client:
            async for result in client.generate_many(asked, in_flight_max=2):
                if result.finished:
                    self._note(str(result.error or ""))


@contextlib.asynccontextmanager
async def load_on(cluster: Endpoint) -> AsyncIterator[Load]:
    """Steady load, of which the last requests are waited for."""
    load = Load()
    async with asyncio.TaskGroup() as group:
        for ordinal in range(CLIENTS):
            group.create_task(load.over_http(cluster.url, ordinal))
            on_grpc = load.over_grpc if ordinal % 2 else load.on_one_stream
            group.create_task(on_grpc(cluster.grpc_address, ordinal))
        try:
            await load.until(CLIENTS)
            yield load
        finally:
            load.over = True


def _line(cluster: Endpoint, process_id: str) -> Line:
    return next(line for line in cluster.status() if line["id"] == process_id)


def _wait_whole(cluster: Endpoint, before: Line) -> None:
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


async def _stream(url: str, begun: asyncio.Event) -> bool:
    """Whether a long stream on a connection of its own came to its end."""
    body = {"model": SERVED, "prompt": [20] * 50, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    last = ""
    try:
        async with (
            httpx.AsyncClient(timeout=RESTART_TIMEOUT_S, trust_env=False) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                last = line or last
                begun.set()
    except httpx.HTTPError:
        return False
    return last == "data: [DONE]"


async def _ask_with_slo(cluster: Endpoint, requests: int) -> list[str]:
    """Ask both APIs for so many, one after the other: what is met, and what cannot be. The ids of the first."""
    body = {"model": SERVED, "prompt": list(range(10, 74)), "max_tokens": 5, "ignore_eos": True}
    asked = {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000", "x-baton-tenant": "team a"}
    ids: list[str] = []
    async with httpx.AsyncClient(base_url=cluster.url, timeout=DEADLINE_S, trust_env=False) as client:
        for _ in range(requests):
            response = await client.post("/v1/completions", json=body, headers=asked)
            assert response.status_code == 200
            ids.append(response.headers["x-request-id"])
        refused = await client.post("/v1/completions", json=body, headers={"x-slo-tpot-ms": "soon"})
        assert refused.status_code == 400 and "x-slo-tpot-ms" in refused.text
    async with BatonClient(cluster.grpc_address, ttft_slo_ms=60_000, tpot_slo_ms=0.001) as slow:
        for _ in range(requests):
            assert "as often as the request asks for" in await _complete(slow, 100, 5)
    return ids


async def test_what_requests_ask_for_is_counted_their_plans_are_explained_and_a_recording_is_replayed(
    cluster: Endpoint, tmp_path: Path
) -> None:
    requests = 10
    told, traces = tmp_path / "told", tmp_path / "traces"
    command = [*BATON, "record", "--output", str(traces), "--state-dir", str(cluster.state_dir)]
    with told.open("w") as stderr:
        recording = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, text=True)
    try:
        wait_for(told.read_text, timeout_s=DEADLINE_S, what="the recording has begun")
        ids = await _ask_with_slo(cluster, requests)
        done = f"\n{requests} requests recorded, 0 dropped, {requests} unfinished"
        wait_for(lambda: done in told.read_text(), timeout_s=DEADLINE_S, what=done, seen=told.read_text)
    finally:
        assert stop(recording) == 0
    [plan] = json.loads(cluster.command("explain", ids[0], "--json"))["plans"]
    assert ids[0] in plan["request_id"] and plan["prompt_tokens"] == 64 and 59.0 < plan["ttft_slo_s"] < 60.0
    assert plan["outcome"]["output_tokens"] == 5 and plan["outcome"]["finish"] == "length"
    assert 0 < plan["outcome"]["ttft_s"] < DEADLINE_S and 0 < plan["outcome"]["itl_s"] < DEADLINE_S
    assert "finished (length): 5 output tokens" in cluster.command("explain", ids[-1])
    unknown = [*BATON, "explain", "nothing", "--state-dir", str(cluster.state_dir)]
    said = subprocess.run(unknown, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert said.returncode == 1 and "No plan of a request 'nothing' is among" in said.stderr
    [trace] = traces.iterdir()
    again = [*BATON, "simulate", "--trace", str(trace), "--prefill", "1", "--decode", "1", "--json"]
    replay = subprocess.run(again, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert replay.returncode == 0, replay.stderr
    assert f"{requests} of {requests} requests are over" in replay.stderr
    fronts = [line["metrics_address"] for line in cluster.status() if line["role"] == "front_proxy"]
    kept = Counter[tuple[str, str]]()
    for address in fronts:
        for sample in metrics(f"http://{address}")["baton_front_proxy_slo_requests"].samples:
            if sample.name.endswith("_total"):
                kept[sample.labels["priority_class"], sample.labels["outcome"]] += round(sample.value)
    assert kept == {("default", "met"): requests, ("default", "refused"): requests}


async def test_killing_a_front_proxy_breaks_its_own_connections_and_frees_what_it_ran(cluster: Endpoint) -> None:
    begun = [asyncio.Event() for _ in range(STREAMS)]
    streams = [asyncio.create_task(_stream(cluster.url, each)) for each in begun]
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(each.wait() for each in begun))
    running = {line["id"]: line for line in await asyncio.to_thread(cluster.status) if line["role"] == "front_proxy"}
    counts = {name: line["requests_running"] for name, line in running.items()}
    assert sum(counts.values()) == STREAMS
    assert min(counts.values()) > 0
    killed = running["front-proxy-1"]
    os.kill(int(killed["pid"]), signal.SIGKILL)
    # What is new is served at once by the other one, or waits for the successor. gRPC does not wait.
    problems = [asyncio.create_task(_ask_once(cluster.url)) for _ in range(STREAMS)]
    async with asyncio.timeout(RESTART_TIMEOUT_S), BatonClient(cluster.grpc_address) as client:
        await asyncio.wait(problems, return_when=asyncio.FIRST_COMPLETED)
        assert await _complete(client, 10, 5) == ""
        assert (await asyncio.to_thread(_line, cluster, "front-proxy-1"))["state"] != "ready"
        assert [await each for each in problems] == [""] * STREAMS
        assert sum([await each for each in streams]) == STREAMS - counts["front-proxy-1"]
    cluster.wait_idle()
    _wait_whole(cluster, killed)


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
        said = await asyncio.to_thread(cluster.command, "drain", "decode-1", "--timeout-s", str(DEADLINE_S))
        assert said.splitlines()[-1].startswith("decode-1 is idle")
        drained = await asyncio.to_thread(_line, cluster, "decode-1")
        assert (drained["state"], drained["requests_running"], drained["pid"]) == ("draining", 0, before["pid"])
        await load.until(2 * CLIENTS)
        assert (await asyncio.to_thread(_line, cluster, "decode-1"))["requests_running"] == 0
        await asyncio.to_thread(cluster.command, "restart", "decode-1")
        await asyncio.to_thread(_wait_whole, cluster, before)
    assert load.problems == []


async def test_a_rolling_restart_of_everything_under_load_loses_nothing(cluster: Endpoint) -> None:
    before = cluster.status()
    async with load_on(cluster) as load:
        said = await asyncio.to_thread(cluster.command, "restart", "all")
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
    assert not any(map(procfs.facts, pids))
    assert left_behind(memory) == set()
    assert "never retrieved" not in cluster.logs()
