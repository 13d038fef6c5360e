"""A gRPC relay carries every kind of call as it is, holds messages back in order, and doubles what may come twice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from launcher.chaos_grpc_relay import Duplicate, Late, MessageRelays, MessageRoute
from launcher.chaos_messages import _TYPES, KINDS, STREAMS, caller, may_come_twice
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.worker.v1 import worker_pb2, worker_pb2_grpc
from runtime.grpc_server import start_server

WAIT_S = 20.0
HOST = "127.0.0.1"
EOF = grpc.aio.EOF  # type: ignore[attr-defined]
BYTES_MAX = 1 << 20


class Echo(scheduler_pb2_grpc.SchedulerServiceServicer, worker_pb2_grpc.WorkerServiceServicer):
    """Notes what it hears. A front proxy's stream answers every question with its number."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.changed = asyncio.Condition()
        self.open = 0
        self.ends = 0
        self.seen: dict[str, Any] = {}

    async def note(self, message: Any) -> None:
        async with self.changed:
            self.heard.append(message)
            self.changed.notify_all()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(WAIT_S), self.changed:
            await self.changed.wait_for(condition)

    async def FrontSession(self, _requests: object, context: Any) -> None:  # noqa: N802
        self.open += 1
        self.seen = {"metadata": dict(context.invocation_metadata()), "left_s": context.time_remaining()}
        await context.send_initial_metadata((("greeting", "hello"),))
        try:
            while (message := await context.read()) is not EOF:
                await self.note(message)
                if message.HasField("plan"):
                    await context.write(scheduler_pb2.FrontReply(plan=scheduler_pb2.Plan(plan_id=message.plan.plan_id)))
                    await context.write(scheduler_pb2.FrontReply(view=scheduler_pb2.ClusterView()))
            context.set_trailing_metadata((("goodbye", "then"),))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")
        finally:
            self.open -= 1
            async with self.changed:
                self.ends += 1
                self.changed.notify_all()

    async def Drain(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.deadline_ms == 0:
            await context.abort(grpc.StatusCode.NOT_FOUND, "who?")
        return worker_pb2.DrainResponse(requests_left=request.deadline_ms)


@asynccontextmanager
async def relayed(seed: int = 1) -> AsyncIterator[tuple[Echo, MessageRelays, grpc.aio.Channel]]:
    echo = Echo()

    def add(server: grpc.aio.Server) -> Sequence[str]:
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(echo, server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(echo, server)
        return ()

    server = await start_server(HOST, 0, add, message_bytes_max=BYTES_MAX)
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind((HOST, 0))
        port = kept.getsockname()[1]
        relays = MessageRelays(HOST, [MessageRoute("scheduler", port, server.port)], seed)
        await relays.start()
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            try:
                yield echo, relays, channel
            finally:
                await relays.close()
                await server.stop(0)


def session(channel: grpc.aio.Channel, **options: Any) -> Any:
    return scheduler_pb2_grpc.SchedulerServiceStub(channel).FrontSession(**options)


def hello(name: str = "front-proxy-0") -> scheduler_pb2.FrontUpdate:
    return scheduler_pb2.FrontUpdate(register=scheduler_pb2.FrontProxyInfo(front_proxy_id=name))


def question(number: int) -> scheduler_pb2.FrontUpdate:
    return scheduler_pb2.FrontUpdate(plan=scheduler_pb2.PlanRequest(plan_id=number))


def over(number: int) -> scheduler_pb2.FrontUpdate:
    return scheduler_pb2.FrontUpdate(ended=scheduler_pb2.RequestEnded(plan_id=number))


async def read(call: Any) -> Any:
    return await asyncio.wait_for(call.read(), WAIT_S)


async def test_a_stream_is_carried_with_metadata_deadline_half_close_and_status() -> None:
    async with relayed() as (echo, relays, channel):
        call = session(channel, timeout=30.0, metadata=(("tenant", "t"),))
        greeting: Any = tuple(await asyncio.wait_for(call.initial_metadata(), WAIT_S))
        assert ("greeting", "hello") in greeting
        await call.write(hello())
        for number in range(1, 100):
            await call.write(question(number))
        for number in range(1, 100):
            assert (await read(call)).plan.plan_id == number
            assert (await read(call)).HasField("view")
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await read(call)
        assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")
        goodbye: Any = tuple(ended.value.trailing_metadata())
        assert ("goodbye", "then") in goodbye
        assert echo.ends == 1
        assert echo.seen["metadata"]["tenant"] == "t"
        # gRPC rounds deadlines on the wire.
        assert 0 < echo.seen["left_s"] < 60.0
        assert relays.disturbed_messages == 0


async def test_a_unary_call_is_carried_with_its_answer_or_its_error() -> None:
    async with relayed() as (_, _, channel):
        stub: Any = worker_pb2_grpc.WorkerServiceStub(channel)
        answer = await stub.Drain(worker_pb2.DrainRequest(deadline_ms=7), timeout=WAIT_S)
        assert answer.requests_left == 7
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Drain(worker_pb2.DrainRequest(), timeout=WAIT_S)
        assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.NOT_FOUND, "who?")


async def test_a_caller_who_leaves_is_gone_at_the_far_end_too() -> None:
    async with relayed() as (echo, _, channel):
        call = session(channel)
        await call.write(hello())
        await echo.until(lambda: echo.heard)
        call.cancel()
        await echo.until(lambda: echo.ends)


async def test_nobody_behind_the_relay_is_told_as_nobody_there() -> None:
    with socket.socket() as nobody, socket.socket() as kept:
        for one in (nobody, kept):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((HOST, 0))
        port = kept.getsockname()[1]
        relays = MessageRelays(HOST, [MessageRoute("scheduler", port, nobody.getsockname()[1])], 1)
        await relays.start()
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            call = session(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read(call)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await relays.close()


async def test_late_messages_keep_their_order_and_lose_nobody() -> None:
    async with relayed(seed=3) as (echo, relays, channel):
        call = session(channel)
        await call.write(hello())
        await echo.until(lambda: echo.heard)
        async with relays.disturbed("front-proxy-0", Late(late_max_s=0.02, fraction=0.3)):
            for number in range(1, 200):
                await call.write(question(number))
            for number in range(1, 200):
                assert (await read(call)).plan.plan_id == number
                await read(call)
        assert 50 < relays.disturbed_messages < 300
        call.cancel()


async def test_a_message_takes_as_long_as_was_drawn_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed() as (echo, relays, channel):
        call = session(channel)
        await call.write(hello())
        await echo.until(lambda: echo.heard)
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(relays._chance, "uniform", lambda low, high: high)
        async with relays.disturbed("scheduler", Late(late_max_s=0.1, fraction=1.0)):
            began_s = loop.time()
            await call.write(question(1))
            await read(call)
            # There and back.
            assert loop.time() - began_s >= 0.2
        call.cancel()


async def test_what_is_said_again_comes_twice_and_what_is_said_once_does_not() -> None:
    async with relayed() as (echo, relays, channel):
        async with relays.disturbed("front-proxy-0", Duplicate()):
            call = session(channel)
            for message in (hello(), question(1), over(1), question(2)):
                await call.write(message)
            answers = [await read(call) for _ in range(6)]
            await echo.until(lambda: len(echo.heard) == 5)
        assert echo.heard == [hello(), question(1), over(1), over(1), question(2)]
        said = [answer.WhichOneof("message") for answer in answers]
        assert said == ["plan", "view", "view"] * 2
        await call.write(over(2))
        await echo.until(lambda: len(echo.heard) == 6)
        call.cancel()


async def test_a_stream_lost_to_its_caller_lives_on_at_its_far_end_until_all_is_well() -> None:
    async with relayed() as (echo, relays, channel):
        lost, spared = session(channel), session(channel)
        await lost.write(hello("front-proxy-0"))
        await spared.write(hello("front-proxy-1"))
        await echo.until(lambda: len(echo.heard) == 2)
        async with relays.disturbed("front-proxy-0", Duplicate()):
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await read(lost)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            again = session(channel)
            await again.write(hello("front-proxy-0"))
            await echo.until(lambda: len(echo.heard) == 3)
            assert echo.open == 3
            assert echo.ends == 0
        await echo.until(lambda: echo.ends)
        for call in (spared, again):
            await call.write(question(1))
            assert (await read(call)).plan.plan_id == 1
            call.cancel()


def test_every_message_that_is_sent_has_been_judged() -> None:
    judged = {(kind.method, kind.direction, kind.field) for kind in KINDS}
    assert len(judged) == len(KINDS)
    known = {
        (method, direction, field.name)
        for (method, direction), message in _TYPES.items()
        for field in message.DESCRIPTOR.oneofs_by_name["message"].fields
    }
    assert judged == known
    assert {method for method, _ in _TYPES} == STREAMS
    assert all(kind.why for kind in KINDS)


def test_who_calls_is_read_from_the_first_message_and_what_is_unknown_is_left_alone() -> None:
    worker = scheduler_pb2.WorkerUpdate(register=cluster_pb2.WorkerInfo(worker_id="decode-1"))
    opened = worker_pb2.AttachRequest(open=worker_pb2.Open(front_proxy_id="front-proxy-1"))
    session_of, attach = "/baton.scheduler.v1.SchedulerService/WorkerSession", "/baton.worker.v1.WorkerService/Attach"
    assert caller(session_of, worker.SerializeToString()) == "decode-1"
    assert caller(attach, opened.SerializeToString()) == "front-proxy-1"
    assert caller("/grpc.health.v1.Health/Check", b"") == ""
    assert caller(attach, b"\xff\xff") == ""
    assert not may_come_twice(attach, "up", b"\xff\xff")
    assert not may_come_twice("/grpc.health.v1.Health/Check", "up", b"")
