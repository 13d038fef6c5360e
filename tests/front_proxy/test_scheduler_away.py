"""A scheduler process that dies or stands still, under a dispatcher and workers with fake engines: nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from engine.config import FakeEngineConfig
from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.metrics import DispatchMetrics
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.process.exit_codes import ExitCode
from runtime.rpc.grpc_server import channel
from tests.front_proxy.test_over_workers import collect, request
from tests.polling import until
from tests.scheduler.api_server import ApiServer
from tests.worker.conftest import StartWorker, start_worker
from worker.config import WorkerConfig, WorkerLimits
from worker.session import SchedulerSession

__all__ = ["start_worker"]

WAIT_S = 30.0
TOKENS = 8


class SchedulerProcess:
    """A real scheduler on a port of its own, which it keeps over restarts."""

    def __init__(self, *settings: str) -> None:
        self.settings = settings
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.metrics_address = ""
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        settings = [f"scheduler.port={self.port}", *self.settings]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cli", "scheduler", *(word for each in settings for word in ("--set", each)),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), WAIT_S)
        told = json.loads(line[line.index(b"{") :])
        assert told["address"] == self.address
        self.metrics_address = told["metrics_address"]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await asyncio.wait_for(self.process.wait(), WAIT_S)

    async def state(self) -> str:
        async with channel(self.address, 1 << 20) as opened:
            stub = cluster_pb2_grpc.StatusServiceStub(opened)
            return str((await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)).process.state)

    async def forgets_all_plans(self) -> None:
        """The last ends are on their way on another stream than the question."""
        async with channel(self.address, 1 << 20) as opened, asyncio.timeout(WAIT_S):
            stub = cluster_pb2_grpc.StatusServiceStub(opened)
            while (await stub.GetStatus(cluster_pb2.GetStatusRequest())).process.requests_running:
                await asyncio.sleep(0.02)


class Scene:
    def __init__(self, scheduler: SchedulerProcess, dispatcher: Dispatcher, registry: CollectorRegistry) -> None:
        self.scheduler, self.dispatcher, self.registry = scheduler, dispatcher, registry
        self._number = 0

    def requests(self, count: int) -> list[asyncio.Task[Any]]:
        tasks = []
        for _ in range(count):
            self._number += 1
            tasks.append(asyncio.create_task(collect(self.dispatcher, request(self._number, TOKENS))))
        return tasks

    async def succeed(self, count: int) -> None:
        for deltas in await asyncio.wait_for(asyncio.gather(*self.requests(count)), WAIT_S):
            assert sum(len(delta.token_ids) for delta in deltas) == TOKENS

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"baton_front_proxy_{name}", labels) or 0.0

    async def until(self, holds: Any) -> None:
        await until(holds, within_s=WAIT_S)


@asynccontextmanager
async def scene(start: StartWorker, scheduler: SchedulerProcess | None = None, *others: str) -> AsyncIterator[Scene]:
    scheduler = scheduler or SchedulerProcess()
    await scheduler.start()
    addresses = ",".join((*others, scheduler.address))
    try:
        config = WorkerConfig(scheduler_address=addresses)
        roles = ["prefill", "prefill", "decode", "decode"]
        workers = [
            await start(role, config=config, limits=WorkerLimits(load_interval_s=0.01), fake=FakeEngineConfig())
            for role in roles
        ]
        sessions = [SchedulerSession(worker.core) for worker in workers]
        tasks = [asyncio.create_task(session.run()) for session in sessions]
        registry = CollectorRegistry()
        # Without a plan from the last view, every one of these requests would wait for a minute.
        front = FrontProxyConfig(scheduler_address=addresses, plan_timeout_s=60.0)
        limits = FrontProxyLimits(plan_patience_s=0.2)
        dispatcher = Dispatcher(front, limits=limits, metrics=DispatchMetrics(registry))
        running = asyncio.create_task(dispatcher.run())
        try:
            for session in sessions:
                await asyncio.wait_for(session.registered.wait(), WAIT_S)
            await dispatcher.wait_usable(WAIT_S)
            yield Scene(scheduler, dispatcher, registry)
            for worker in workers:
                await worker.settled()
        finally:
            await dispatcher.close()
            await asyncio.wait_for(running, WAIT_S)
            for session in sessions:
                session.leave("the test is over")
            await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)
    finally:
        await scheduler.kill()


@pytest.mark.timeout(120)
async def test_requests_go_on_while_the_scheduler_is_dead_and_it_takes_over_when_it_is_back(
    start_worker: StartWorker,
) -> None:
    async with scene(start_worker) as it:
        await it.succeed(4)
        assert it.value("degraded_plans_total", outcome="planned") == 0
        under_way = it.requests(8)
        await it.scheduler.kill()
        await asyncio.gather(*under_way)
        await it.until(lambda: it.value("scheduler_connected") == 0)
        await it.succeed(20)
        degraded = it.value("degraded_plans_total", outcome="planned")
        assert degraded >= 20
        await it.scheduler.start()
        await it.until(lambda: it.value("degraded") == 0)
        await it.succeed(4)
        assert it.value("degraded_plans_total", outcome="refused") == 0
        await it.scheduler.forgets_all_plans()


@pytest.mark.timeout(120)
async def test_a_scheduler_that_stands_still_costs_one_short_wait(start_worker: StartWorker) -> None:
    async with scene(start_worker) as it:
        await it.succeed(4)
        it.scheduler.signal(signal.SIGSTOP)
        try:
            await it.succeed(8)
            assert it.value("degraded_plans_total", outcome="planned") == 8
            assert it.value("scheduler_connected") == 0
        finally:
            it.scheduler.signal(signal.SIGCONT)
        await it.until(lambda: it.value("degraded") == 0)
        before = it.value("degraded_plans_total", outcome="planned")
        await it.succeed(4)
        assert it.value("degraded_plans_total", outcome="planned") == before
        await it.scheduler.forgets_all_plans()


@pytest.mark.timeout(120)
async def test_a_stand_by_takes_over_when_the_leader_is_killed(start_worker: StartWorker, tmp_path: Path) -> None:
    shared = f"scheduler.leader_lock_file={tmp_path / 'leader'}"
    leader, stand_by = SchedulerProcess(shared), SchedulerProcess(shared)
    async with scene(start_worker, leader, stand_by.address) as it:
        await stand_by.start()
        try:
            assert await stand_by.state() == "standby"
            await it.succeed(4)
            under_way = it.requests(8)
            await leader.kill()
            await asyncio.gather(*under_way)
            await it.succeed(8)
            await it.until(lambda: it.value("scheduler_connected") == 1 and it.value("degraded") == 0)
            assert await stand_by.state() == "ready"
            before = it.value("degraded_plans_total", outcome="planned")
            await it.succeed(4)
            assert it.value("degraded_plans_total", outcome="planned") == before
            await stand_by.forgets_all_plans()
            await leader.start()
            assert await leader.state() == "standby", "who comes back stands by"
        finally:
            await stand_by.kill()


@pytest.mark.timeout(120)
async def test_a_stand_by_takes_over_the_lease_of_a_leader_that_stands_still(
    start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Kubernetes. Of two with a lock on a file, `baton up` kills it first: ``tests/e2e/test_two_schedulers.py``."""
    shared = (
        "scheduler.leader_store=kubernetes",
        "scheduler.kubernetes.lease_duration_s=3",
    )
    leader, stand_by = SchedulerProcess(*shared), SchedulerProcess(*shared)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(ApiServer(tmp_path).listening())
        monkeypatch.setenv("KUBECONFIG", str(server.kube_config()))
        it = await stack.enter_async_context(scene(start_worker, leader, stand_by.address))
        await stand_by.start()
        try:
            assert (await leader.state(), await stand_by.state()) == ("ready", "standby")
            await it.succeed(4)
            under_way = it.requests(8)
            leader.signal(signal.SIGSTOP)
            try:
                await asyncio.gather(*under_way)
                await it.succeed(8)
                async with asyncio.timeout(WAIT_S):
                    while await stand_by.state() != "ready":
                        await it.succeed(1)
                await it.until(lambda: it.value("scheduler_connected") == 1 and it.value("degraded") == 0)
                await it.succeed(4)
            finally:
                leader.signal(signal.SIGCONT)
            assert leader.process is not None
            assert await asyncio.wait_for(leader.process.wait(), WAIT_S) == ExitCode.LEADS_NO_LONGER, (
                "it finds its time over"
            )
            before = it.value("degraded_plans_total", outcome="planned")
            await it.succeed(4)
            assert it.value("degraded_plans_total", outcome="planned") == before
            assert await stand_by.state() == "ready"
            await stand_by.forgets_all_plans()
        finally:
            await stand_by.kill()
