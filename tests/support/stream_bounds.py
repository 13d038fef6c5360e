"""The public gRPC service in this process for tests, with the bounds of a GenerateMany stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from front_proxy.config import FrontProxyLimits
from front_proxy.gateway.identity import ALL_CLASSES
from front_proxy.gateway.in_flight import InFlight
from front_proxy.grpc_api.client import BatonClient
from front_proxy.grpc_api.service import SERVICE, Inference, InferenceService
from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from runtime.priority_class import PriorityClass
from runtime.rpc.grpc_server import start_server

MESSAGE_BYTES_MAX = 1 << 20


def limits(**changed: Any) -> FrontProxyLimits:
    """The usual ones but for what is ``changed``."""
    usual = {"output_deltas_max": 16, "output_bytes_max": MESSAGE_BYTES_MAX, "message_bytes_max": MESSAGE_BYTES_MAX}
    return FrontProxyLimits(**{**usual, **changed})


def room(count_max: int) -> InFlight:
    return InFlight(count_max, usable=lambda: True, retry_after_s=2.0)


async def many(*messages: Any) -> AsyncIterator[inference_pb2.GenerateManyRequest]:
    """A stream of requests and of cancellations, which are the names of requests."""
    for message in messages:
        if isinstance(message, str):
            yield inference_pb2.GenerateManyRequest(cancel_request_id=message)
        else:
            yield inference_pb2.GenerateManyRequest(generate=message)


@asynccontextmanager
async def client_of(
    inference: Inference,
    in_flight: InFlight,
    bounds: FrontProxyLimits | None = None,
    classes_allowed: Sequence[PriorityClass] = ALL_CLASSES,
) -> AsyncIterator[BatonClient]:
    """A client of a real server over ``inference``."""
    bounds = bounds or limits()
    service = InferenceService(inference, in_flight, bounds, classes_allowed)

    def add(server: grpc.aio.Server) -> list[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
        return [SERVICE]

    running = await start_server("127.0.0.1", 0, add, message_bytes_max=bounds.message_bytes_max)
    async with BatonClient(running.address) as client:
        yield client
    await running.stop(1.0)
