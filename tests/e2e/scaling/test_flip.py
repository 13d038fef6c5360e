"""Real engines change their roles under load: no request fails, no token is wrong, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from launcher.hosted import status
from protos.cluster.v1.cluster_pb2 import ProcessStatus
from tests.e2e.cluster import BATON, COMMAND_TIMEOUT_S, Endpoint, wait_for
from tests.e2e.conftest import SERVED

pytestmark = pytest.mark.timeout(900)

CLIENTS = 4
FLIP_MAX_S = 60.0
TOKENS = 24
# So many take longer than a command to start.
LONG_TOKENS = 3800
LONG_REQUESTS = 8
PROMPTS = 40
_rng = random.Random(5)
WANTED = [[_rng.randrange(10, 500) for _ in range(_rng.randint(20, 600))] for _ in range(PROMPTS)]


async def complete(client: httpx.AsyncClient, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    body = {
        "model": SERVED, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    token_ids: list[int] = response.json()["choices"][0]["token_ids"]
    return token_ids


@contextlib.asynccontextmanager
async def load(baton: Endpoint, right: list[list[int]]) -> AsyncIterator[None]:
    """Clients that always ask again, until the block ends. Every answer must come, with these tokens."""
    stop, answered = asyncio.Event(), 0

    async def ask(first: int) -> None:
        nonlocal answered
        number = first
        async with httpx.AsyncClient(base_url=baton.url, timeout=120) as client:
            while not stop.is_set():
                index = number % PROMPTS
                assert await complete(client, WANTED[index]) == right[index], f"wrong tokens for prompt {index}"
                answered += 1
                number += CLIENTS

    async with asyncio.TaskGroup() as group:
        for first in range(CLIENTS):
            group.create_task(ask(first))
        yield
        stop.set()
    assert answered > CLIENTS


def role(baton: Endpoint, worker: str) -> dict[str, Any]:
    (line,) = [line for line in baton.status() if line["id"] == worker]
    return line


async def flip(baton: Endpoint, worker: str, wanted: str) -> float:
    began_s = time.monotonic()
    await asyncio.to_thread(baton.command, "flip", worker, wanted)
    assert role(baton, worker)["role"] == wanted
    return time.monotonic() - began_s


def settled(baton: Endpoint, **roles: str) -> None:
    """All serve, and these workers have these roles."""

    def so() -> bool:
        lines = {line["id"]: line for line in baton.status()}
        named = {name.replace("_", "-"): wanted for name, wanted in roles.items()}
        ready = all(line["state"] == "ready" for line in lines.values())
        return ready and all(lines[name]["role"] == wanted for name, wanted in named.items())

    wait_for(so, timeout_s=300.0, what=f"roles {roles}", seen=baton.status)


@pytest.fixture
def right(baton: Endpoint) -> list[list[int]]:
    """The answers before anything changes its role."""
    settled(baton, prefill_0="prefill", decode_0="decode", decode_1="decode")

    async def all_of_them() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=baton.url, timeout=120) as client:
            return [await complete(client, prompt) for prompt in WANTED]

    return asyncio.run(all_of_them())


async def test_workers_change_their_roles_under_load_and_back(baton: Endpoint, right: list[list[int]]) -> None:
    epochs = {line["id"]: line["epoch"] for line in baton.status()}
    async with load(baton, right):
        took_s = [
            await flip(baton, worker, wanted)
            for worker, wanted in (
                ("decode-0", "prefill"),
                ("prefill-0", "decode"),
                ("decode-0", "decode"),
                ("prefill-0", "prefill"),
            )
        ]
        # Two at once.
        took_s += await asyncio.gather(flip(baton, "decode-1", "prefill"), flip(baton, "prefill-0", "decode"))
        took_s += await asyncio.gather(flip(baton, "decode-1", "decode"), flip(baton, "prefill-0", "prefill"))
    baton.wait_idle()
    # Requests of a few seconds are finished first; the command looks twice a second.
    assert max(took_s) < FLIP_MAX_S, took_s
    assert {line["id"]: line["epoch"] for line in baton.status()} == epochs, "no engine was started again"
    assert role(baton, "decode-0")["flips"] == 2


async def seen(address: str, condition: Callable[[ProcessStatus], bool]) -> None:
    """Asked directly: a command takes longer than a change of role may."""
    async with asyncio.timeout(60.0):
        while (line := await status.ask(address, timeout_s=10.0)) is None or not condition(line):
            await asyncio.sleep(0.02)


async def broken_by(baton: Endpoint, right: list[list[int]], harm: Callable[[], None]) -> None:
    """A change of role during which ``harm`` is done. One of its requests is long, so that it waits."""
    async with load(baton, right), httpx.AsyncClient(base_url=baton.url, timeout=120) as client:
        waits = [asyncio.ensure_future(complete(client, WANTED[n], tokens=LONG_TOKENS)) for n in range(LONG_REQUESTS)]
        address = role(baton, "decode-1")["address"]
        await seen(address, lambda line: line.requests_running > 1)
        command = [*BATON, "flip", "decode-1", "prefill", "--state-dir", str(baton.state_dir)]
        going = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            await seen(address, lambda line: line.state == "flipping")
        except TimeoutError:
            going.kill()
            raise AssertionError(f"it does not begin: {going.communicate()}, {baton.status()}") from None
        harm()
        answers = await asyncio.gather(*waits)
        assert [answer[:TOKENS] for answer in answers] == right[:LONG_REQUESTS]
        await asyncio.to_thread(going.communicate, timeout=COMMAND_TIMEOUT_S)
        await asyncio.to_thread(settled, baton, decode_1="prefill")
    baton.wait_idle()
    assert await flip(baton, "decode-1", "decode")


async def test_a_worker_that_is_killed_meanwhile_comes_back_in_the_other_role(
    baton: Endpoint, right: list[list[int]]
) -> None:
    await broken_by(baton, right, lambda: os.kill(role(baton, "decode-1")["pid"], signal.SIGKILL))


async def test_a_scheduler_that_is_killed_meanwhile_is_told_of_the_new_role(
    baton: Endpoint, right: list[list[int]]
) -> None:
    await broken_by(baton, right, lambda: os.kill(role(baton, "scheduler")["pid"], signal.SIGKILL))
