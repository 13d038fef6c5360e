"""The worker's session with a scheduler: register, report, reconnect, drain, goodbye."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.config import FakeEngineConfig
from kv_transfer.prefix.block_keys import prompt_keys, unpack
from kv_transfer.prefix.events import BlocksStored
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.rpc.grpc_server import RunningServer
from scheduler import wire
from scheduler.routing.block_feed import BlockFeed
from scheduler.routing.prefix_index import PrefixIndex
from tests.support.in_process_worker import WAIT_S, InProcessWorker, StartWorker, sampling, submit
from tests.support.polling import until
from tests.support.scripted_peer import ScriptedPeer, listed
from worker.config import WorkerConfig, WorkerLimits
from worker.kv_events.mirror import BlockMirror
from worker.session import SchedulerSession

REGISTERED = pb.WorkerCommand(registered=pb.Registered(heartbeat_interval_ms=50))
DRAIN = pb.WorkerCommand(drain=pb.Drain())
SNAPSHOT = pb.WorkerCommand(snapshot_blocks=pb.SnapshotBlocks())
PROMPT = list(range(100))
KEYS = prompt_keys(PROMPT, 16)


async def load_at(scheduler: ScriptedPeer, **wanted: object) -> None:
    """Wait for a load report in which all of these hold."""
    while True:
        load = await scheduler.hears("load")
        if all(getattr(load, name) == value for name, value in wanted.items()):
            return


async def worker_of(
    start: StartWorker,
    *schedulers: RunningServer,
    role: str = "decode",
    fake: FakeEngineConfig | None = None,
    **limits: Any,
) -> InProcessWorker:
    """A worker that knows these schedulers and asks them quickly."""
    worker: InProcessWorker = await start(
        role,
        fake=fake,
        limits=WorkerLimits(load_interval_s=0.01, scheduler_backoff_min_s=0.02, **limits),
        config=WorkerConfig(scheduler_address=",".join(server.address for server in schedulers)),
    )
    return worker


@asynccontextmanager
async def session_of(worker: InProcessWorker) -> AsyncIterator[SchedulerSession]:
    session = SchedulerSession(worker.core)
    running = asyncio.create_task(session.run())
    try:
        yield session
    finally:
        session.leave("test over")
        await asyncio.wait_for(running, WAIT_S)


async def test_it_registers_reports_changes_beats_and_says_goodbye(start_worker: StartWorker) -> None:
    scheduler = ScriptedPeer(REGISTERED)
    async with scheduler.listening() as server:
        worker = await worker_of(start_worker, server, role="prefill")
        async with session_of(worker) as session:
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
            info = await scheduler.hears("register")
            assert info == worker.core.info()
            assert (info.role, info.context_tokens_max) == (cluster_pb2.ROLE_PREFILL, 4096)
            await load_at(scheduler, state=cluster_pb2.PROCESS_STATE_READY, leases_held=0)
            await load_at(scheduler, leases_held=0)  # nothing changed: that was a heartbeat
            await (await worker.attach()).one(submit(1, [1] * 40, prefill=True))
            await load_at(scheduler, leases_held=1, kv_blocks_used=3)
            named = await scheduler.hears("leases")
            assert len(named.lease_ids) == 1
            assert list(named.lease_ids) == worker.core.role.leases.oldest(5)
        assert (await scheduler.hears("leaving")).reason == "test over"


async def test_it_tells_of_steps_before_the_load_that_follows(start_worker: StartWorker) -> None:
    scheduler = ScriptedPeer(REGISTERED)
    async with scheduler.listening() as server:
        worker = await worker_of(start_worker, server, role="prefill")
        async with session_of(worker) as session:
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
            await load_at(scheduler, state=cluster_pb2.PROCESS_STATE_READY)
            client = await worker.attach()
            await client.one(submit(1, [1] * 40, prefill=True, request_id="first"))
            progress = await scheduler.hears("progress")
            (step,) = progress.steps
            assert (step.prefill_tokens, step.prefill_pairs, step.decode_requests) == (40, 800, 0)
            assert 0 < step.duration_us < WAIT_S * 1e6
            assert (await asyncio.wait_for(scheduler.told.get(), WAIT_S)).HasField("load")
            await client.one(submit(1, [1] * 40, prefill=True, request_id="second"))
            progress = await scheduler.hears("progress")
            assert [step.prefill_tokens for step in progress.steps] == [8]


@pytest.mark.parametrize(("blocks", "told"), [(4096, False), (64, True)])
async def test_a_little_more_kv_of_the_same_requests_waits_for_the_heartbeat(
    start_worker: StartWorker, blocks: int, told: bool
) -> None:
    scheduler = ScriptedPeer(pb.WorkerCommand(registered=pb.Registered(heartbeat_interval_ms=60_000)))
    async with asyncio.timeout(WAIT_S), scheduler.listening() as server:
        worker = await worker_of(
            start_worker,
            server,
            fake=FakeEngineConfig(kv_blocks_total=blocks, decode_step_us=500),
            heartbeat_interval_s=60.0,
        )
        async with session_of(worker) as session:
            await session.registered.wait()
            await (await worker.attach()).one(submit(1, [1] * 40, sampling=sampling(400)))
            loads = [await scheduler.hears("load")]
            while loads[-1].requests_running or loads[-1].kv_blocks_used or len(loads) == 1:
                loads.append(await scheduler.hears("load"))
        used = [load.kv_blocks_used for load in loads if load.requests_running]
        assert used and (len(used) > 3) == told


async def test_it_comes_back_after_the_scheduler_did(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = ScriptedPeer(REGISTERED)
    async with scheduler.listening() as server:
        port = server.port
        worker = await worker_of(start_worker, server)
        running = session_of(worker)
        session = await running.__aenter__()
        await asyncio.wait_for(session.registered.wait(), WAIT_S)
    await until(lambda: not session.registered.is_set(), within_s=WAIT_S)
    second = ScriptedPeer(REGISTERED)
    async with second.listening(port):
        await asyncio.wait_for(session.registered.wait(), WAIT_S)
        assert (await second.hears("register")).worker_id == worker.core.worker_id
        await running.__aexit__(None, None, None)
    assert "the session with the scheduler ended" in caplog.text


async def test_a_leader_older_than_one_that_was_heard_is_left(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    former, leader = (
        ScriptedPeer(pb.WorkerCommand(registered=pb.Registered(heartbeat_interval_ms=50, leader_epoch=epoch)))
        for epoch in (7, 8)
    )
    async with leader.listening() as one, former.listening() as two:
        worker = await worker_of(start_worker, one, two)
        async with session_of(worker) as session:
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
            leader.says.put_nowait(None)
            await until(lambda: not session.registered.is_set(), within_s=WAIT_S)
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
            assert (former.streams, leader.streams) == (1, 2)
    assert "it led once, and another one leads now" in caplog.text


@pytest.mark.parametrize("at_once", [True, False])
async def test_the_scheduler_can_drain_it_also_together_with_its_registration(
    start_worker: StartWorker, at_once: bool
) -> None:
    scheduler = ScriptedPeer(listed(REGISTERED, DRAIN) if at_once else REGISTERED)
    async with scheduler.listening() as server:
        worker = await worker_of(start_worker, server)
        async with session_of(worker):
            if not at_once:
                scheduler.says.put_nowait(DRAIN)
            await load_at(scheduler, state=cluster_pb2.PROCESS_STATE_DRAINING)
            assert not worker.core.lifecycle.accepts


async def test_a_scheduler_that_refuses_or_is_away_is_asked_again_and_leaving_does_not_wait_for_it(
    start_worker: StartWorker,
) -> None:
    scheduler = ScriptedPeer(pb.WorkerCommands())
    async with scheduler.listening() as server:
        worker = await worker_of(start_worker, server)
        async with session_of(worker) as session:
            await until(lambda: worker.core.metrics.session_failures._value.get() >= 3, within_s=WAIT_S)
            assert not session.registered.is_set()
            scheduler.first = REGISTERED
            await asyncio.wait_for(session.registered.wait(), WAIT_S)


class Index:
    """What a scheduler makes of the blocks that a worker's session tells it."""

    def __init__(self, worker: InProcessWorker) -> None:
        self.worker_id, self.epoch = worker.core.worker_id, worker.core.engine.info.epoch
        self.index = PrefixIndex(blocks_max=1000)
        self.feed = BlockFeed(self.index)
        self.feed.joined(self.worker_id, self.epoch)

    @property
    def held(self) -> int:
        """Leading blocks of the prompt."""
        holder = self.feed.holder(self.worker_id)
        assert holder is not None
        return self.index.longest(KEYS).get(holder, 0)

    def told(self, message: pb.BlockDelta) -> bool:
        """Whether a snapshot is to be asked for."""
        assert sum(len(unpack(level.keys)) for level in message.levels) <= 2
        return self.feed.apply(self.worker_id, wire.block_delta(message, self.epoch), 0.0)


async def test_its_blocks_are_told_in_small_pieces_from_the_start_and_again_after_a_gap(
    start_worker: StartWorker,
) -> None:
    scheduler = ScriptedPeer(REGISTERED)
    async with asyncio.timeout(WAIT_S), scheduler.listening() as server:
        worker = await worker_of(start_worker, server, delta_blocks_max=2)
        front = await worker.attach()
        await front.one(submit(1, PROMPT[:48]))
        async with session_of(worker):
            scheduled = Index(worker)
            first = await scheduler.hears("blocks")
            assert first.reset and first.more and not scheduled.told(first)
            while scheduled.held < 3:
                assert not scheduled.told(await scheduler.hears("blocks"))
            await front.one(submit(1, PROMPT))
            while scheduled.held < 6:
                assert not scheduled.told(await scheduler.hears("blocks"))
            await scheduler.hears("blocks")  # lost
            while not scheduled.told(await scheduler.hears("blocks")):
                pass
            assert (scheduled.held, scheduled.feed.gaps) == (0, 1)
            scheduler.says.put_nowait(SNAPSHOT)
            while scheduled.held < 6:
                scheduled.told(await scheduler.hears("blocks"))
            assert scheduled.feed.gaps == 1
        scheduled = Index(worker)
        async with session_of(worker):
            await scheduler.hears("register")
            while scheduled.held < 6:
                assert not scheduled.told(await scheduler.hears("blocks"))


async def test_each_rank_tells_of_its_own_blocks_and_repeats_them_alone(start_worker: StartWorker) -> None:
    scheduler = ScriptedPeer(REGISTERED)
    async with asyncio.timeout(WAIT_S), scheduler.listening() as server:
        worker = await worker_of(start_worker, server)
        info = worker.core.engine.info
        stored = [
            BlocksStored(hashes=[b"b"], parent=None, token_ids=[rank] * 8, block_size_tokens=8) for rank in (0, 1)
        ]
        worker.core.mirrors = mirrors = [
            BlockMirror(epoch=info.epoch, block_size_tokens=8, blocks_max=9, rank=rank) for rank in (0, 1)
        ]
        for mirror, event in zip(mirrors, stored, strict=True):
            mirror.apply([event])
        async with session_of(worker):
            told = [await scheduler.hears("blocks") for _ in range(2)]
            assert [(delta.rank, delta.seq, delta.reset) for delta in told] == [(0, 1, True), (1, 1, True)]
            assert told[0].levels[0].keys != told[1].levels[0].keys
            again = pb.WorkerCommand(snapshot_blocks=pb.SnapshotBlocks(rank=1))
            unknown = pb.WorkerCommand(snapshot_blocks=pb.SnapshotBlocks(rank=7))
            scheduler.says.put_nowait(pb.WorkerCommands(messages=[unknown, again]))
            while not (delta := await scheduler.hears("blocks")).reset:
                pass
            assert (delta.rank, delta.levels[0].keys) == (1, told[1].levels[0].keys)
