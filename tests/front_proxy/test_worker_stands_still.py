"""A worker process that stands still gets nothing new, costs no new request, and is used again when it goes on."""

from __future__ import annotations

import asyncio
import json
import signal

import httpx
import pytest

from tests.front_proxy.test_scheduler_away import SchedulerProcess, scene
from tests.worker.conftest import StartWorker, start_worker
from tests.worker.test_run import end, start

__all__ = ["start_worker"]

WAIT_S = 30.0
SETTINGS = ("scheduler.silence_timeout_s=2", "scheduler.worker_lease_s=60")


async def unusable(scheduler: SchedulerProcess) -> dict[str, int]:
    """The scheduler's own count of workers that it sends nothing."""

    async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
        text = (await client.get(f"http://{scheduler.metrics_address}/metrics")).text
    name = "baton_scheduler_unusable_workers{"
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return {line.split('"')[1]: int(float(line.split()[-1])) for line in lines}


async def until(scheduler: SchedulerProcess, silent: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await unusable(scheduler)).get("silent") != silent:
            await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
async def test_a_worker_that_stands_still_is_left_out_until_it_goes_on(start_worker: StartWorker) -> None:
    scheduler = SchedulerProcess(*SETTINGS)
    async with scene(start_worker, scheduler) as it:
        other = await start("decode", worker={"scheduler_address": scheduler.address}, engine={"block_size_tokens": 16})
        try:
            assert other.stdout is not None
            json.loads(await asyncio.wait_for(other.stdout.readline(), WAIT_S))
            await it.until(lambda: any(w.worker_id == "decode-0" for w in it.dispatcher.cluster().workers))
            await it.succeed(8)
            other.send_signal(signal.SIGSTOP)
            await until(scheduler, silent=1)
            await it.succeed(16)
            other.send_signal(signal.SIGCONT)
            await until(scheduler, silent=0)
            await it.succeed(8)
        finally:
            other.send_signal(signal.SIGCONT)
            other.send_signal(signal.SIGTERM)
            assert (await end(other))[0] == 0
