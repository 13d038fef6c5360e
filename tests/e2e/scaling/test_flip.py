"""Real engines change their roles under load: no request fails, no token is wrong, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import Endpoint, wait_for
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


@pytest.fixture(name="right")
def right_answers(baton: Endpoint) -> list[list[int]]:
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
