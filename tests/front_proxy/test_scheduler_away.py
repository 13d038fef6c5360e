"""A scheduler process that stands still and dies, under a dispatcher and workers with fake engines: unnoticed."""

from __future__ import annotations

import asyncio
import itertools
import signal
from typing import Any

import pytest

from tests.support.in_process_cluster import cluster, collect, request
from tests.support.in_process_worker import StartWorker
from tests.support.scheduler_process import SchedulerProcess

TOKENS = 8
# Without a plan from the last view, each request would wait for a minute.
SETTINGS: dict[str, Any] = {"plan_timeout_s": 60.0, "plan_patience_s": 0.2}


@pytest.mark.timeout(120)
async def test_requests_go_on_while_the_scheduler_stands_still_or_is_dead_and_it_takes_over_when_it_is_back(
    start_worker: StartWorker,
) -> None:
    numbers = itertools.count()
    async with (
        SchedulerProcess() as scheduler,
        cluster(start_worker, scheduler_address=scheduler.address, **SETTINGS) as it,
    ):

        def requests(count: int) -> list[asyncio.Task[Any]]:
            wanted = (request(next(numbers), TOKENS) for _ in range(count))
            return [asyncio.create_task(collect(it.dispatcher, one)) for one in wanted]

        async def planned_here(count: int) -> float:
            """Requests succeed; how many of them were planned without the scheduler."""
            before = it.value("degraded_plans_total", outcome="planned")
            for deltas in await asyncio.gather(*requests(count)):
                assert sum(len(delta.token_ids) for delta in deltas) == TOKENS
            return it.value("degraded_plans_total", outcome="planned") - before

        assert await planned_here(4) == 0
        scheduler.signal(signal.SIGSTOP)
        assert await planned_here(8) == 8
        assert it.value("scheduler_connected") == 0
        scheduler.signal(signal.SIGCONT)
        await it.until(lambda: it.value("degraded") == 0)
        assert await planned_here(4) == 0
        await scheduler.forgets_all_plans()

        under_way = requests(8)
        await scheduler.kill()
        await asyncio.gather(*under_way)
        await it.until(lambda: it.value("scheduler_connected") == 0)
        assert await planned_here(20) == 20
        await scheduler.start()
        await it.until(lambda: it.value("degraded") == 0)
        assert await planned_here(4) == 0
        assert it.value("degraded_plans_total", outcome="refused") == 0
        await scheduler.forgets_all_plans()
        await it.settled()
