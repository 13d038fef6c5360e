"""Clients that leave at any moment, over HTTP and gRPC, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import random

import httpx
import pytest

from front_proxy.grpc_api.client import BatonClient
from protos.inference.v1.inference_pb2 import SamplingOptions
from tests.e2e.cluster import Endpoint
from tests.e2e.conftest import SERVED

# The first one also waits for every engine to start.
pytestmark = pytest.mark.timeout(900)

REQUESTS = 200
IN_FLIGHT = 10
LONG = SamplingOptions(max_tokens=400, ignore_eos=True, temperature=0.0)


async def _http(client: httpx.AsyncClient, token_ids: list[int]) -> None:
    body = {
        "model": SERVED, "prompt": token_ids, "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_lines():
            pass


async def _grpc(client: BatonClient, token_ids: list[int]) -> None:
    async with contextlib.aclosing(client.generate(token_ids, LONG)) as responses:
        async for _ in responses:
            pass


async def test_two_hundred_cancelled_requests_leave_no_lease_and_no_block(baton: Endpoint) -> None:
    rng = random.Random(3)
    gate = asyncio.Semaphore(IN_FLIGHT)
    async with (
        httpx.AsyncClient(base_url=baton.url, timeout=60) as http,
        BatonClient(baton.grpc_address) as grpc_client,
    ):

        async def one(index: int) -> None:
            token_ids = [rng.randrange(10, 500) for _ in range(rng.choice((5, 64, 300, 1200)))]
            # Most moments of a request's life are early: planning and transfer last milliseconds.
            after_s = rng.choice((0.0, 0.002, 0.01, rng.uniform(0, 0.1), rng.uniform(0, 1.5)))
            async with gate:
                work = _http(http, token_ids) if index % 2 else _grpc(grpc_client, token_ids)
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    await asyncio.wait_for(work, after_s)

        await asyncio.gather(*(one(index) for index in range(REQUESTS)))

    baton.wait_idle(timeout_s=5)
    logs = baton.logs()
    assert "never retrieved" not in logs
    assert "Traceback" not in logs, logs[logs.index("Traceback") - 500 :][:3000]
    after = httpx.post(
        f"{baton.url}/v1/completions", json={"model": SERVED, "prompt": "Prefill is", "max_tokens": 4}, timeout=60
    )
    assert after.status_code == 200
