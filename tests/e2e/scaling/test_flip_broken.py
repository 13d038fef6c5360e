"""A change of role during which its worker, or the scheduler, is killed. Real engines; minutes of restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable

import httpx
import pytest

from launcher.hosted import status
from protos.cluster.v1.cluster_pb2 import ProcessStatus
from tests.e2e.cluster import BATON, COMMAND_TIMEOUT_S, Endpoint
from tests.e2e.scaling.test_flip import (
    LONG_REQUESTS,
    LONG_TOKENS,
    TOKENS,
    WANTED,
    complete,
    flip,
    load,
    right_answers,  # noqa: F401 - a fixture
    role,
    settled,
)

pytestmark = pytest.mark.timeout(900)


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
