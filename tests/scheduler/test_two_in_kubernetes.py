"""Two whole schedulers whose lease is a Lease of Kubernetes: one leads, whatever happens to the API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.grpc_errors import serves_instead
from runtime.grpc_server import channel
from scheduler.config import KubernetesConfig, SchedulerConfig
from scheduler.exit_codes import EXIT_NOT_LEADER
from scheduler.metrics import SchedulerMetrics
from scheduler.run import run
from tests.scheduler.api_server import HOST, ApiServer

WAIT_S = 30.0
POLL_S = 0.02


class Running:
    """A scheduler in this process."""

    def __init__(self, server: ApiServer, lease_s: float) -> None:
        self._config = SchedulerConfig(
            leader_store="kubernetes",
            leader_interval_s=0.05,
            leader_lease_s=lease_s,
            heartbeat_interval_s=0.1,
            deaf_step_down_s=0.3,
            kubernetes=KubernetesConfig(
                api_host=HOST, api_port=server.port, account_dir=str(server.account_dir), call_timeout_s=0.4
            ),
        )
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self.address = ""
        self.ended = asyncio.create_task(self._run())

    async def _run(self) -> object:
        try:
            await run(self._config, self._is_ready, stop=self._stop, metrics=SchedulerMetrics(CollectorRegistry()))
        except SystemExit as end:
            return end.code
        return 0

    def _is_ready(self, told: Mapping[str, str]) -> None:
        self.address = told["address"]
        self._ready.set()

    async def until(self, state: str) -> None:
        async with asyncio.timeout(WAIT_S):
            await self._ready.wait()
            async with channel(self.address, 1 << 20) as opened:
                stub = cluster_pb2_grpc.StatusServiceStub(opened)
                while (await stub.GetStatus(cluster_pb2.GetStatusRequest())).process.state != state:
                    await asyncio.sleep(POLL_S)

    async def refers_to(self) -> str:
        """Who leads, by its word."""
        async with channel(self.address, 1 << 20) as opened, asyncio.timeout(WAIT_S):
            call = scheduler_pb2_grpc.SchedulerServiceStub(opened).FrontSession()
            await call.write(pb.FrontUpdate(register=pb.FrontProxyInfo(front_proxy_id="f")))
            await call.code()
            return await serves_instead(call)

    async def stop(self) -> object:
        self._stop.set()
        return await asyncio.wait_for(self.ended, WAIT_S)


@asynccontextmanager
async def two(server: ApiServer, lease_s: float = 30.0) -> AsyncIterator[tuple[Running, Running]]:
    server.store.put_free("baton-scheduler")
    leader = Running(server, lease_s)
    await leader.until("ready")
    stand_by = Running(server, lease_s)
    try:
        await stand_by.until("standby")
        yield leader, stand_by
    finally:
        await asyncio.gather(leader.stop(), stand_by.stop())


@pytest.mark.timeout(120)
async def test_the_one_that_stands_by_names_the_leader_and_follows_it_when_it_stops(tmp_path: Path) -> None:
    async with ApiServer(tmp_path).listening() as server, two(server) as (leader, stand_by):
        async with asyncio.timeout(WAIT_S):
            while await stand_by.refers_to() != leader.address:
                await asyncio.sleep(POLL_S)
        assert await leader.stop() == 0
        await stand_by.until("ready")


@pytest.mark.timeout(120)
async def test_a_leader_whose_renewals_hang_ends_and_somebody_leads_again_when_they_do_not(tmp_path: Path) -> None:
    async with ApiServer(tmp_path).listening() as server, two(server, lease_s=2.0) as (leader, stand_by):
        server.troubles += ["hangs"] * 1000
        assert await asyncio.wait_for(leader.ended, WAIT_S) == EXIT_NOT_LEADER
        assert not stand_by.ended.done(), "who stands by waits for the API server to be back"
        server.troubles.clear()
        await stand_by.until("ready")


@pytest.mark.timeout(120)
async def test_a_leader_that_nobody_asks_makes_way_for_the_one_that_is_asked(tmp_path: Path) -> None:
    async with ApiServer(tmp_path).listening() as server, two(server) as (leader, stand_by):

        async def ask() -> None:
            while True:
                await stand_by.refers_to()

        asking = asyncio.create_task(ask())
        assert await asyncio.wait_for(leader.ended, WAIT_S) == EXIT_NOT_LEADER
        asking.cancel()
        await stand_by.until("ready")
        assert set(server.store.leases) == {"baton-scheduler", "baton-scheduler-asked"}
