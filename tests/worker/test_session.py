"""The worker's session with a scheduler: register, report, reconnect, drain, goodbye."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.rpc.grpc_server import RunningServer, start_server
from tests.support.in_process_worker import EOF, WAIT_S, InProcessWorker, StartWorker, submit
from tests.support.polling import until
from tests.support.scripted_peer import listed
from worker.config import WorkerConfig, WorkerLimits
from worker.session import SchedulerSession


class Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Takes every worker in and remembers what it said."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[pb.WorkerUpdate] = asyncio.Queue()
        self.commands: asyncio.Queue[pb.WorkerCommand | None] = asyncio.Queue()
        self.at_once: list[pb.WorkerCommand] = []
        """What comes together with its registration."""
        self.refuse = False
        self.registered = pb.Registered(heartbeat_interval_ms=50)

    async def WorkerSession(self, _requests: object, context: Any) -> None:  # noqa: N802
        if self.refuse:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no")
        self._hear(await context.read())
        await context.write(listed(pb.WorkerCommand(registered=self.registered), *self.at_once))
        reader = asyncio.create_task(self._read(context))
        command = asyncio.create_task(self.commands.get())
        try:
            while True:
                await asyncio.wait({reader, command}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    return
                if (message := command.result()) is None:
                    return
                await context.write(listed(message))
                command = asyncio.create_task(self.commands.get())
        finally:
            reader.cancel()
            command.cancel()

    async def _read(self, context: Any) -> None:
        while (updates := await context.read()) is not EOF:
            self._hear(updates)

    def _hear(self, updates: pb.WorkerUpdates) -> None:
        for message in updates.messages:
            self.said.put_nowait(message)

    async def until(self, **wanted: object) -> cluster_pb2.WorkerLoad:
        """The next load report in which all of these hold."""
        async with asyncio.timeout(WAIT_S):
            while True:
                load = (await self.said.get()).load
                if all(getattr(load, name) == value for name, value in wanted.items()):
                    return load


@asynccontextmanager
async def scheduler_at(scheduler: Scheduler, port: int = 0) -> AsyncIterator[RunningServer]:
    def add(server: grpc.aio.Server) -> list[str]:
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(scheduler, server)
        return ["baton.scheduler.v1.SchedulerService"]

    server = await start_server("127.0.0.1", port, add, message_bytes_max=1 << 20)
    try:
        yield server
    finally:
        await server.stop(0)


@asynccontextmanager
async def session_of(worker: InProcessWorker) -> AsyncIterator[SchedulerSession]:
    session = SchedulerSession(worker.core)
    running = asyncio.create_task(session.run())
    try:
        yield session
    finally:
        session.leave("test over")
        await asyncio.wait_for(running, WAIT_S)


LIMITS = WorkerLimits(load_interval_s=0.01, scheduler_backoff_min_s=0.02)


def config(address: str) -> WorkerConfig:
    return WorkerConfig(scheduler_address=address)


async def test_it_registers_reports_changes_beats_and_says_goodbye(start_worker: StartWorker) -> None:
    scheduler = Scheduler()
    async with scheduler_at(scheduler) as server:
        worker = await start_worker("prefill", limits=LIMITS, config=config(server.address))
        async with session_of(worker) as session:
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
            info = (await scheduler.said.get()).register
            assert info == worker.core.info()
            assert (info.role, info.context_tokens_max) == (cluster_pb2.ROLE_PREFILL, 4096)
            await scheduler.until(state=cluster_pb2.PROCESS_STATE_READY, leases_held=0)
            await scheduler.until(leases_held=0)  # nothing changed: that was a heartbeat
            await (await worker.attach()).one(submit(1, [1] * 40, prefill=True))
            await scheduler.until(leases_held=1, kv_blocks_used=3)
            async with asyncio.timeout(WAIT_S):
                while not (named := await scheduler.said.get()).HasField("leases"):
                    pass
            assert len(named.leases.lease_ids) == 1
            assert list(named.leases.lease_ids) == worker.core.role.leases.oldest(5)
        async with asyncio.timeout(WAIT_S):
            while not (last := await scheduler.said.get()).HasField("leaving"):
                pass
        assert last.leaving.reason == "test over"


async def test_it_comes_back_after_the_scheduler_did(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler()
    async with scheduler_at(scheduler) as server:
        port = server.port
        worker = await start_worker("decode", limits=LIMITS, config=config(server.address))
        running = session_of(worker)
        session = await running.__aenter__()
        await asyncio.wait_for(session.registered.wait(), WAIT_S)
    await until(lambda: not session.registered.is_set(), within_s=WAIT_S)
    second = Scheduler()
    async with scheduler_at(second, port):
        await asyncio.wait_for(session.registered.wait(), WAIT_S)
        assert (await second.said.get()).register.worker_id == worker.core.worker_id
        await running.__aexit__(None, None, None)
    assert "the session with the scheduler ended" in caplog.text


async def test_a_leader_older_than_one_that_was_heard_is_left(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    former, leader = Scheduler(), Scheduler()
    former.registered.leader_epoch, leader.registered.leader_epoch = 7, 8
    async with scheduler_at(leader) as one, scheduler_at(former) as two:
        worker = await start_worker("decode", limits=LIMITS, config=config(f"{one.address},{two.address}"))
        async with session_of(worker) as session:
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
            leader.commands.put_nowait(None)
            await until(lambda: not session.registered.is_set(), within_s=WAIT_S)
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
            assert former.said.qsize() and leader.said.qsize() > former.said.qsize()
    assert "it led once, and another one leads now" in caplog.text


async def test_the_scheduler_can_drain_it(start_worker: StartWorker) -> None:
    scheduler = Scheduler()
    async with scheduler_at(scheduler) as server:
        worker = await start_worker("decode", limits=LIMITS, config=config(server.address))
        async with session_of(worker):
            scheduler.commands.put_nowait(pb.WorkerCommand(drain=pb.Drain()))
            await scheduler.until(state=cluster_pb2.PROCESS_STATE_DRAINING)
            assert not worker.core.lifecycle.accepts


async def test_a_drain_that_comes_together_with_its_registration_is_heard(start_worker: StartWorker) -> None:
    scheduler = Scheduler()
    scheduler.at_once = [pb.WorkerCommand(drain=pb.Drain())]
    async with scheduler_at(scheduler) as server:
        worker = await start_worker("decode", limits=LIMITS, config=config(server.address))
        async with session_of(worker):
            await scheduler.until(state=cluster_pb2.PROCESS_STATE_DRAINING)


async def test_a_scheduler_that_refuses_or_is_away_is_asked_again_and_leaving_does_not_wait_for_it(
    start_worker: StartWorker,
) -> None:
    scheduler = Scheduler()
    scheduler.refuse = True
    async with scheduler_at(scheduler) as server:
        worker = await start_worker("decode", limits=LIMITS, config=config(server.address))
        async with session_of(worker) as session:
            await until(lambda: worker.core.metrics.session_failures._value.get() >= 3, within_s=WAIT_S)
            assert not session.registered.is_set()
            scheduler.refuse = False
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
