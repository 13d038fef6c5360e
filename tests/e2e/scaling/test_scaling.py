"""`baton up` as actuator, with fake engines: fewer workers under load, none at idle, and back for the next request."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from launcher.hosted import state_file
from launcher.hosted.state_file import ProcessRecord
from tests.e2e.cluster import Endpoint, baton_up, metrics, wait_for
from tests.e2e.conftest import FAKE, SERVED, Alive

pytestmark = pytest.mark.timeout(600)

IDLE_S = 5.0
WAKE_TIMEOUT_S = 3.0
# More than a request may wait.
SLOW_START_S = 10.0
WAIT_S = 240.0
TOKENS = 8
PROMPT = [10 + n % 90 for n in range(64)]


def scaled(**settings: Any) -> list[str]:
    told = {"actuator": "launcher", "idle_s": IDLE_S, **settings}
    return [word for name, value in told.items() for word in ("--set", f"scheduler.scaling.{name}={value}")]


@pytest.fixture(scope="module")
def slow(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    """One whose workers start slowly. It falls asleep while the other is tested, which takes half a minute."""
    arguments = [*FAKE, *scaled(wake_timeout_s=WAKE_TIMEOUT_S), "--set", f"engine.fake.start_s={SLOW_START_S}"]
    return alive.get("scaling", "slow", lambda: baton_up(tmp_path_factory.mktemp("slow"), arguments))


@pytest.fixture(scope="module")
def cluster(alive: Alive, slow: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    arguments = [*FAKE, "--prefill", "1", "--decode", "2", *scaled()]
    return alive.get("scaling", "baton", lambda: baton_up(tmp_path_factory.mktemp("scaling"), arguments))


def workers(cluster: Endpoint) -> dict[str, ProcessRecord]:
    """As the launcher has recorded them: a command would take longer to start than some of them live."""
    return {one.id: one for one in state_file.read(cluster.state_dir).processes if one.role in ("prefill", "decode")}


def states(cluster: Endpoint) -> list[str]:
    return sorted(one.state for one in workers(cluster).values())


async def sleeps(cluster: Endpoint) -> None:
    await asyncio.to_thread(
        wait_for, lambda: set(states(cluster)) == {"stopped"}, timeout_s=WAIT_S, what="none is left", seen=cluster.logs
    )


async def becomes(cluster: Endpoint, wanted: list[str], what: str) -> None:
    await asyncio.to_thread(wait_for, lambda: states(cluster) == wanted, timeout_s=WAIT_S, what=what, seen=cluster.logs)


def client_of(cluster: Endpoint) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, timeout=WAIT_S, trust_env=False)


async def ask(client: httpx.AsyncClient) -> httpx.Response:
    body = {"model": SERVED, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return await client.post("/v1/completions", json={**body, "return_token_ids": True})


def tokens_of(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


async def test_under_a_light_load_one_worker_goes_and_no_request_fails(cluster: Endpoint) -> None:
    stop, answered = asyncio.Event(), 0

    async def load() -> None:
        nonlocal answered
        async with client_of(cluster) as client:
            right = tokens_of(await ask(client))
            while not stop.is_set():
                assert tokens_of(await ask(client)) == right
                answered += 1

    def gone() -> bool:
        return states(cluster) == ["ready", "ready", "stopped"]

    async with asyncio.TaskGroup() as group:
        group.create_task(load())
        await asyncio.to_thread(wait_for, gone, timeout_s=WAIT_S, what="one worker went", seen=cluster.logs)
        before = answered
        table = await asyncio.to_thread(cluster.command, "status")
        [scheduler] = [line for line in await asyncio.to_thread(cluster.status) if line["role"] == "scheduler"]
        stop.set()
    assert answered > before
    assert workers(cluster)["prefill-0"].state == "ready"
    assert re.search(r"^decode: 1 wanted, 1 registered \(", table, re.MULTILINE), table
    shown = metrics(f"http://{scheduler['metrics_address']}")["baton_scheduler_desired_replicas"].samples
    assert {sample.labels["pool"]: sample.value for sample in shown} == {"prefill": 1.0, "decode": 1.0}


async def test_at_idle_all_go_and_requests_that_come_then_are_answered(cluster: Endpoint) -> None:
    await sleeps(cluster)
    async with client_of(cluster) as client:
        assert (await client.get("/health")).status_code == 200
        answers = await asyncio.gather(*(ask(client) for _ in range(5)))
    assert len({tuple(tokens_of(answer)) for answer in answers}) == 1
    assert "decode: 0 workers from now on" in (cluster.state_dir / "up.stderr").read_text()
    # A request is answered by a decode worker alone, if that one is ready first.
    await becomes(cluster, ["ready", "ready", "stopped"], "the fewest, of each role")
    await sleeps(cluster)


async def test_a_wake_that_takes_too_long_gives_503_with_the_time_of_a_start(slow: Endpoint) -> None:
    await sleeps(slow)
    async with client_of(slow) as client:
        refused = await ask(client)
        assert refused.status_code == 503
        # In time: before a worker was there.
        assert "ready" not in states(slow)
        assert int(refused.headers["retry-after"]) >= SLOW_START_S - WAKE_TIMEOUT_S - 1
        assert "Workers are started, which takes about" in refused.text
        await becomes(slow, ["ready", "ready"], "both")
        assert len(tokens_of(await ask(client))) == TOKENS
