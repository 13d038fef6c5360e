"""A worker changes its role in place: when it is idle, within its time, and told to the scheduler."""

from __future__ import annotations

import asyncio

from front_proxy.request.endings import FINAL_KINDS
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.worker.v1 import worker_pb2
from runtime.failures import FailureKind
from tests.support.in_process_worker import WAIT_S, InProcessWorker, StartWorker, submit
from tests.support.polling import until
from tests.support.scripted_peer import ScriptedPeer
from tests.worker.test_session import REGISTERED, load_at, session_of, worker_of
from worker.lifecycle import Event, Lifecycle, State


def flip(role: cluster_pb2.Role, timeout_ms: int = 60_000) -> pb.WorkerCommand:
    return pb.WorkerCommand(flip=pb.Flip(role=role, timeout_ms=timeout_ms))


def failed(deltas: list[worker_pb2.Delta]) -> bool:
    return any(delta.HasField("failure") for delta in deltas)


async def changed(worker: InProcessWorker) -> None:
    await until(lambda: worker.core.flips_ended == 1 and worker.core.lifecycle.accepts, within_s=WAIT_S)


async def test_an_idle_worker_registers_in_the_other_role_and_serves_it(start_worker: StartWorker) -> None:
    scheduler = ScriptedPeer(REGISTERED)
    scheduler.says.put_nowait(flip(cluster_pb2.ROLE_DECODE))
    async with scheduler.listening() as server:
        worker = await worker_of(start_worker, server, role="prefill")
        client = await worker.attach()
        async with session_of(worker):
            first = await scheduler.hears("register")
            second = await scheduler.hears("register")
            await load_at(scheduler, state=cluster_pb2.PROCESS_STATE_READY)
            assert (first.role, first.registration) == (cluster_pb2.ROLE_PREFILL, 0)
            assert (second.role, second.registration) == (cluster_pb2.ROLE_DECODE, 1)
            assert (second.worker_id, second.epoch) == (first.worker_id, first.epoch)
            # On the stream that was open before.
            assert not failed(await client.one(submit(1, [1] * 40)))
            assert worker.core.status().role == "decode"
            assert worker.core.status().flips == 1


async def test_a_prompt_for_the_old_role_is_refused_and_may_be_tried_elsewhere(start_worker: StartWorker) -> None:
    worker: InProcessWorker = await start_worker("prefill")
    client = await worker.attach()
    worker.core.flip("decode", 60.0)
    await changed(worker)
    (answer,) = await client.one(submit(1, [1] * 40, prefill=True))
    assert "got request" in answer.failure.message
    assert FailureKind.INCOMPATIBLE not in FINAL_KINDS


async def test_it_waits_for_leases_and_takes_nothing_meanwhile(start_worker: StartWorker) -> None:
    worker: InProcessWorker = await start_worker("prefill")
    client = await worker.attach()
    await client.one(submit(1, [1] * 40, prefill=True, request_id="held"))
    worker.core.flip("decode", 60.0)
    assert failed(await client.one(submit(2, [1] * 40, prefill=True, request_id="late")))
    assert worker.core.lifecycle.state is State.FLIPPING
    worker.core.apply(worker.core.role.leases.owner_gone(next(iter(worker.core.streams))))
    await changed(worker)
    assert worker.core.role.name == "decode"
    await worker.settled()


async def test_what_does_not_end_in_time_keeps_its_role_and_its_leases(start_worker: StartWorker) -> None:
    worker: InProcessWorker = await start_worker("prefill")
    client = await worker.attach()
    await client.one(submit(1, [1] * 40, prefill=True, request_id="held"))
    worker.core.flip("decode", 0.05)
    await changed(worker)
    assert (worker.core.role.name, worker.core.registration, len(worker.core.role.leases)) == ("prefill", 0, 1)
    assert not failed(await client.one(submit(2, [1] * 40, prefill=True, request_id="more")))


async def test_one_change_at_a_time(start_worker: StartWorker) -> None:
    worker: InProcessWorker = await start_worker("prefill")
    worker.core.flip("decode", 60.0)
    worker.core.flip("prefill", 60.0)
    await changed(worker)
    assert worker.core.role.name == "decode"
    worker.core.flip("prefill", 60.0)
    await until(lambda: worker.core.flips_ended == 2, within_s=WAIT_S)
    assert (worker.core.role.name, worker.core.registration) == ("prefill", 2)


async def test_one_that_is_to_stop_keeps_its_role(start_worker: StartWorker) -> None:
    worker: InProcessWorker = await start_worker("prefill")
    worker.core.flip("decode", 60.0)
    worker.core.happen(Event.DRAIN_ASKED)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (worker.core.role.name, worker.core.lifecycle.state) == ("prefill", State.DRAINING)
    worker.core.flip("decode", 60.0)
    assert worker.core.lifecycle.state is State.DRAINING


async def test_a_change_that_ends_while_no_scheduler_hears_is_told_to_the_next(start_worker: StartWorker) -> None:
    scheduler = ScriptedPeer(REGISTERED)
    async with scheduler.listening() as server:
        worker = await worker_of(start_worker, server, role="prefill")
        worker.core.flip("decode", 60.0)
        await changed(worker)
        async with session_of(worker):
            told = await scheduler.hears("register")
            assert (told.role, told.registration) == (cluster_pb2.ROLE_DECODE, 1)


def test_a_change_of_role_gives_way_to_a_drain() -> None:
    lifecycle = Lifecycle()
    for event, state in (
        (Event.STARTED, State.READY),
        (Event.FLIP_ASKED, State.FLIPPING),
        (Event.DRAIN_ASKED, State.DRAINING),
        (Event.FLIP_ENDED, State.DRAINING),
    ):
        lifecycle.handle(event)
        assert lifecycle.state is state
