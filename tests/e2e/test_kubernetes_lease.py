"""Two scheduler processes that share a Lease of Kubernetes, served by a test server. Engines are fake."""

from __future__ import annotations

import asyncio
import itertools
import signal
from pathlib import Path

import pytest

from runtime.process.exit_codes import ExitCode
from tests.scheduler.api_server import ApiServer
from tests.support.in_process_cluster import cluster, collect, request
from tests.support.in_process_worker import StartWorker, start_worker
from tests.support.scheduler_process import WAIT_S, SchedulerProcess

__all__ = ["start_worker"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
TOKENS = 8
SHARED = (
    "scheduler.leader_store=kubernetes",
    "scheduler.kubernetes.lease_duration_s=3",
)


async def test_a_stand_by_takes_over_the_lease_of_a_leader_that_stands_still(
    start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two with a lock on a file, `baton up` kills it first: ``tests/e2e/test_chaos.py``."""
    numbers = itertools.count()
    async with ApiServer(tmp_path).listening() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kube_config()))
        async with (
            SchedulerProcess(*SHARED) as leader,
            SchedulerProcess(*SHARED) as stand_by,
            cluster(start_worker, scheduler_address=f"{stand_by.address},{leader.address}", plan_timeout_s=60.0) as it,
        ):

            async def succeed(count: int) -> None:
                wanted = [request(next(numbers), TOKENS) for _ in range(count)]
                for deltas in await asyncio.gather(*(collect(it.dispatcher, one) for one in wanted)):
                    assert sum(len(delta.token_ids) for delta in deltas) == TOKENS

            assert ((await leader.status()).state, (await stand_by.status()).state) == ("ready", "standby")
            await succeed(4)
            leader.signal(signal.SIGSTOP)
            await succeed(8)
            async with asyncio.timeout(WAIT_S):
                while (await stand_by.status()).state != "ready":
                    await succeed(1)
            await it.until(lambda: it.value("scheduler_connected") == 1 and it.value("degraded") == 0)
            leader.signal(signal.SIGCONT)
            assert leader.process is not None
            code = await asyncio.wait_for(leader.process.wait(), WAIT_S)
            assert code == ExitCode.LEADS_NO_LONGER, "it finds its time over"
            before = it.value("degraded_plans_total", outcome="planned")
            await succeed(4)
            assert it.value("degraded_plans_total", outcome="planned") == before
            assert (await stand_by.status()).state == "ready"
            await stand_by.forgets_all_plans()
            await it.settled()
