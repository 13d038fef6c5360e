"""Whole workers in this process: real roles, real gRPC, fake engines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from decode_worker.config import DecodeWorkerConfig
from decode_worker.role import DecodeRole
from engine.config import EngineConfig, FakeEngineConfig
from engine.fake.engine import FakeEngine
from engine.fake.fabric import FakeKvFabric
from prefill_worker.config import PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from protos.cluster.v1 import cluster_pb2
from protos.worker.v1 import worker_pb2 as pb
from protos.worker.v1 import worker_pb2_grpc
from runtime.rpc.grpc_server import channel, start_server
from tests.support.polling import until
from tests.support.scripted_peer import listed
from worker import service
from worker.config import WorkerConfig, WorkerLimits
from worker.core import WorkerCore
from worker.lifecycle import Event
from worker.metrics import WorkerMetrics
from worker.role import RoleBehaviour

WAIT_S = 10.0
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it
ROLES: dict[str, tuple[Any, Any]] = {
    "prefill": (PrefillRole, PrefillWorkerConfig),
    "decode": (DecodeRole, DecodeWorkerConfig),
}
_epochs = itertools.count(1)
_request_ids = itertools.count(1)


def sampling(max_tokens: int = 8, **more: object) -> bytes:
    return msgspec.msgpack.encode({"max_tokens": max_tokens, **more})


def submit(
    slot: int,
    tokens: list[int],
    *,
    handoff: cluster_pb2.KvHandoff | None = None,
    prefill: bool = False,
    **fields: Any,
) -> pb.AttachRequest:
    fields.setdefault("request_id", f"r{slot}-{next(_request_ids)}")
    fields.setdefault("sampling", sampling(1 if prefill else 8))
    message = pb.Submit(slot=slot, token_ids=tokens, **fields)
    if prefill:
        message.prefill.SetInParent()
    else:
        message.decode.SetInParent()
        if handoff is not None:
            message.decode.handoff.CopyFrom(handoff)
    return pb.AttachRequest(submit=message)


def told(step: pb.StepOutputs) -> list[pb.Delta]:
    """What a step says, the tokens in its columns as deltas of their own."""
    counts = list(step.token_counts) or [1] * len(step.token_slots)
    tokens = iter(step.token_ids)
    columns = [
        pb.Delta(slot=slot, token_ids=itertools.islice(tokens, count))
        for slot, count in zip(step.token_slots, counts, strict=True)
    ]
    assert next(tokens, None) is None
    return [*columns, *step.deltas]


class Client:
    """A front proxy's end of one Attach stream."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.steps: list[list[pb.Delta]] = []
        self._unread: list[pb.Delta] = []

    async def send(self, *messages: pb.AttachRequest) -> None:
        """In one write."""
        await asyncio.wait_for(self.call.write(listed(*messages)), WAIT_S)

    async def step(self) -> list[pb.Delta]:
        message = await asyncio.wait_for(self.call.read(), WAIT_S)
        assert message is not EOF, "the stream ended"
        self.steps.append(told(message.step))
        return self.steps[-1]

    async def until_end(self, *slots: int) -> dict[int, list[pb.Delta]]:
        """Every delta of these slots up to the last one of each."""
        got: dict[int, list[pb.Delta]] = {slot: [] for slot in slots}
        left = set(slots)
        while left:
            for delta in await self.step():
                if delta.slot in got:
                    got[delta.slot].append(delta)
                    if delta.finish or delta.HasField("failure"):
                        left.discard(delta.slot)
        return got

    async def one(self, message: pb.AttachRequest) -> list[pb.Delta]:
        await self.send(message)
        slot = message.submit.slot
        return (await self.until_end(slot))[slot]

    async def ended(self) -> grpc.StatusCode:
        """The status the worker ended the stream with."""
        try:
            while await asyncio.wait_for(self.call.read(), WAIT_S) is not EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        code: grpc.StatusCode = await self.call.code()
        return code


class InProcessWorker:
    """One worker with a server on a free port."""

    def __init__(self, core: WorkerCore, engine: FakeEngine, stack: AsyncExitStack) -> None:
        self.core = core
        self.engine = engine
        self._stack = stack

    async def stub(self) -> worker_pb2_grpc.WorkerServiceStub:
        opened = await self._stack.enter_async_context(channel(self.core.address, 64 * 1024 * 1024))
        return worker_pb2_grpc.WorkerServiceStub(opened)

    async def attach(self, front_proxy_id: str = "front-0", engine_version: str = "") -> Client:
        client = Client((await self.stub()).Attach())
        self._stack.callback(client.call.cancel)
        await client.send(pb.AttachRequest(open=pb.Open(front_proxy_id=front_proxy_id, engine_version=engine_version)))
        opened = await asyncio.wait_for(client.call.read(), WAIT_S)
        assert opened.opened.worker.worker_id == self.core.worker_id
        return client

    async def settled(self) -> None:
        """Wait until nothing is held, in the worker's view and in the engine's."""
        core = self.core
        await until(
            lambda: core.idle and self.engine.load().kv_blocks_used == 0 and not core.background, within_s=WAIT_S
        )


StartWorker = Callable[..., Any]


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    """Starts workers that share one fabric, stops them all, and demands that no task or exception is left."""
    unheard: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()

    def hear(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # gRPC has one poller for a process, and wakes the closed loops of earlier tests with it.
        if "PollerCompletionQueue" not in context["message"]:
            unheard.append(context)

    loop.set_exception_handler(hear)
    fabric = FakeKvFabric()
    async with AsyncExitStack() as stack:

        async def start(
            role: str = "decode",
            *,
            worker_id: str = "",
            config: WorkerConfig | None = None,
            fake: FakeEngineConfig | None = None,
            limits: WorkerLimits | None = None,
            settings: Any = None,
            role_limits: Any = None,
            ranks: int = 1,
        ) -> InProcessWorker:
            config = config or WorkerConfig()
            name = worker_id or f"{role}-{next(_epochs)}"
            engine_config = EngineConfig(
                kind="fake", block_size_tokens=16, data_parallel_size=ranks, fake=fake or FakeEngineConfig()
            )
            engine = FakeEngine(engine_config, worker_id=name, epoch=next(_epochs), fabric=fabric)
            make, defaults = ROLES[role]
            made: RoleBehaviour = make(settings or defaults(), engine.info, name, role_limits)
            other_make, other_defaults = ROLES["prefill" if role == "decode" else "decode"]
            core = WorkerCore(
                engine=engine,
                role=made,
                other_role=other_make(other_defaults(), engine.info, name, None),
                config=config,
                worker_id=name,
                metrics=WorkerMetrics(made.name, CollectorRegistry()),
                limits=limits,
            )
            await stack.enter_async_context(_served(core, engine))
            return InProcessWorker(core, engine, stack)

        yield start
    assert not unheard, unheard


@asynccontextmanager
async def _served(core: WorkerCore, engine: FakeEngine) -> AsyncIterator[None]:
    server = await start_server(
        "127.0.0.1", 0, lambda server: service.add_services(core, server), message_bytes_max=64 * 1024 * 1024
    )
    core.address = server.address
    core.happen(Event.STARTED)
    loops = {asyncio.create_task(core.watch_leases()), asyncio.create_task(core.watch_flips())}
    try:
        yield
    finally:
        core.happen(Event.STOPPED)
        await server.stop(1.0)
        assert await core.background.wait(WAIT_S) == 0
        for loop in loops:
            loop.cancel()
        await asyncio.wait(loops)
        await engine.close()
        assert core.admission.requests == 0
        assert core.prefill_tokens_queued == 0
