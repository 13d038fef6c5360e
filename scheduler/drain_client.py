"""Asks the scheduler to have one worker drain, for ``baton drain``. Does not wait: the worker's status says more."""

from __future__ import annotations

from typing import Any

import grpc

from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.rpc.addresses import Addresses
from runtime.rpc.grpc_server import channel

MESSAGE_BYTES_MAX = 1 << 16


async def drain_worker(scheduler_address: str, worker_id: str, *, timeout_s: float) -> None:
    """Have a worker finish what it runs and take nothing new; ``timeout_s`` bounds the scheduler's answer.

    The worker stays registered, as draining, until its process ends: `baton restart` replaces it, and a restarted
    worker takes requests again. ``scheduler_address`` may name several, separated by commas; the leader answers.
    Raises grpc.aio.AioRpcError: NOT_FOUND where no such worker is registered, UNAVAILABLE where no scheduler leads.
    """
    addresses = Addresses(scheduler_address)
    request = pb.DrainWorkerRequest(worker_id=worker_id)
    for last in [False] * (len(addresses) - 1) + [True]:
        async with channel(addresses.current, MESSAGE_BYTES_MAX) as opened:
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(opened)
            try:
                await stub.DrainWorker(request, timeout=timeout_s)
                return
            except grpc.aio.AioRpcError as error:
                if last or error.code() is grpc.StatusCode.NOT_FOUND:
                    raise
                addresses.failed()
