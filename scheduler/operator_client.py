"""What commands and actuators ask the scheduler: drain, explain, record traffic, replicas, keys. Prints nothing.

``scheduler_address`` may name several, separated by commas; the leader answers. Every function raises
grpc.aio.AioRpcError: UNAVAILABLE where no scheduler leads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import msgspec

from protos.accounts.v1 import accounts_pb2_grpc
from protos.cluster.v1 import cluster_pb2
from protos.experts.v1 import experts_pb2, experts_pb2_grpc
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.roles import WorkerRole
from runtime.rpc.addresses import Addresses
from runtime.rpc.grpc_server import channel
from scheduler.scaling.live import TuneReport

MESSAGE_BYTES_MAX = 16 * 1024 * 1024
_OF_LEADER = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
)

Answer = TypeVar("Answer")


async def drain_worker(scheduler_address: str, worker_id: str, *, timeout_s: float) -> None:
    """Have a worker finish what it runs and take nothing new; ``timeout_s`` bounds the scheduler's answer.

    Does not wait for the worker: its status says more. It stays registered, as draining, until its process ends: `baton
    restart` replaces it, and a restarted worker takes requests again. NOT_FOUND: no such worker is registered.
    """
    request = pb.DrainWorkerRequest(worker_id=worker_id)
    await _ask(scheduler_address, lambda stub: stub.DrainWorker(request, timeout=timeout_s))


async def flip_worker(scheduler_address: str, worker_id: str, role: WorkerRole, *, timeout_s: float) -> None:
    """Have a worker change its role. Does not wait for it: its status says more.

    NOT_FOUND: no such worker is registered. FAILED_PRECONDITION: it must not change now.
    """
    number = cluster_pb2.ROLE_PREFILL if role == "prefill" else cluster_pb2.ROLE_DECODE
    request = pb.FlipWorkerRequest(worker_id=worker_id, role=number)
    await _ask(scheduler_address, lambda stub: stub.FlipWorker(request, timeout=timeout_s))


async def tune_pools(scheduler_address: str, mode: pb.TuneMode, *, with_looks: bool, timeout_s: float) -> TuneReport:
    """What the planner of roles knows, after it was told ``mode``."""
    request = pb.TunePoolsRequest(mode=mode, with_looks=with_looks)
    answer: pb.TunePoolsResponse = await _ask(
        scheduler_address, lambda stub: stub.TunePools(request, timeout=timeout_s)
    )
    return msgspec.msgpack.decode(answer.report, type=TuneReport)


async def explain_plan(scheduler_address: str, request_id: str, *, timeout_s: float) -> pb.ExplainPlanResponse:
    """The plans of a request. NOT_FOUND: none of those that are remembered is of it."""
    request = pb.ExplainPlanRequest(request_id=request_id)
    return await _ask(scheduler_address, lambda stub: stub.ExplainPlan(request, timeout=timeout_s))


async def show_experts(scheduler_address: str, *, timeout_s: float) -> experts_pb2.ShowGroupsResponse:
    """Every group of ranks that runs experts in parallel."""
    request = experts_pb2.ShowGroupsRequest()
    stub = experts_pb2_grpc.ExpertServiceStub
    return await _ask(scheduler_address, lambda experts: experts.ShowGroups(request, timeout=timeout_s), stub)


async def change_experts(
    scheduler_address: str, request: experts_pb2.ChangeGroupRequest, *, timeout_s: float
) -> experts_pb2.ChangeGroupResponse:
    """Plan or begin a change of one group. NOT_FOUND: no such group. INVALID_ARGUMENT: it cannot change so now."""
    stub = experts_pb2_grpc.ExpertServiceStub
    return await _ask(scheduler_address, lambda experts: experts.ChangeGroup(request, timeout=timeout_s), stub)


async def record_trace(scheduler_address: str, *, timeout_s: float) -> AsyncGenerator[pb.TraceRecords, None]:
    """What is asked and ends from now on, until the iterator is closed.

    ``timeout_s`` bounds the first message: TimeoutError. RESOURCE_EXHAUSTED: too many recordings run.
    """
    request = pb.RecordTraceRequest()
    async with aclosing(_stream(scheduler_address, lambda stub: stub.RecordTrace(request), timeout_s)) as batches:
        async for records in batches:
            yield records


async def watch_replicas(
    scheduler_address: str, actuator: str, *, timeout_s: float
) -> AsyncGenerator[pb.DesiredReplicas, None]:
    """How many workers are wanted, each time that the leader has looked, until the iterator is closed.

    ``timeout_s`` bounds the wait for each message; the leader sends one every 5 s: TimeoutError. FAILED_PRECONDITION:
    ``scheduler.scaling.actuator`` names another actuator. RESOURCE_EXHAUSTED: too many listen.
    """
    request = pb.WatchReplicasRequest(actuator=actuator)
    watched = _stream(scheduler_address, lambda stub: stub.WatchReplicas(request), timeout_s, silence_s=timeout_s)
    async with aclosing(watched) as messages:
        async for desired in messages:
            yield desired


async def _stream(
    scheduler_address: str, begin: Callable[[Any], Any], timeout_s: float, *, silence_s: float | None = None
) -> AsyncGenerator[Any, None]:
    """What the leader streams. ``timeout_s`` bounds the first message, ``silence_s`` the further ones: TimeoutError."""
    addresses = Addresses(scheduler_address)
    for last in _tries(addresses):
        async with channel(addresses.current, MESSAGE_BYTES_MAX) as opened:
            call = begin(scheduler_pb2_grpc.SchedulerServiceStub(opened))
            messages, begun = aiter(call), False
            try:
                while True:
                    async with asyncio.timeout(silence_s if begun else timeout_s):
                        message = await anext(messages)
                    begun = True
                    yield message
            except StopAsyncIteration:
                return
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                if begun or last or _is_of_leader(error):
                    raise
                addresses.failed()
            finally:
                call.cancel()


async def ask_accounts(
    scheduler_address: str, key: str, call: Callable[[Any, Sequence[tuple[str, str]]], Awaitable[Answer]]
) -> Answer:
    """What AccountsService answers. ``call`` gets its stub and the metadata that show ``key``; empty: none."""
    shown = (("authorization", f"Bearer {key}"),) if key else ()
    return await _ask(scheduler_address, lambda stub: call(stub, shown), accounts_pb2_grpc.AccountsServiceStub)


async def _ask(
    scheduler_address: str,
    call: Callable[[Any], Awaitable[Answer]],
    stub: Callable[[Any], Any] = scheduler_pb2_grpc.SchedulerServiceStub,
) -> Answer:
    addresses = Addresses(scheduler_address)
    for last in _tries(addresses):
        async with channel(addresses.current, MESSAGE_BYTES_MAX) as opened:
            try:
                return await call(stub(opened))
            except grpc.aio.AioRpcError as error:
                if last or _is_of_leader(error):
                    raise
                addresses.failed()
    raise AssertionError("the last try returns or raises")


def _is_of_leader(error: Exception) -> bool:
    """Whether no other scheduler would say something else."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _OF_LEADER


def _tries(addresses: Addresses) -> list[bool]:
    """One for each address; True: it is the last."""
    return [False] * (len(addresses) - 1) + [True]
