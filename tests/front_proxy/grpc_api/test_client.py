"""The Python client and the proxy that the environment names."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from front_proxy.grpc_api import repeats
from front_proxy.grpc_api.client import BatonClient, BatonError, request
from front_proxy.grpc_api.service import SERVICE
from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from runtime.rpc.grpc_server import start_server


class Models(inference_pb2_grpc.InferenceServiceServicer):
    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:  # noqa: N802
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="one")])


def add(server: grpc.aio.Server) -> list[str]:
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Models(), server)
    return [SERVICE]


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = await start_server("127.0.0.1", 0, add, message_bytes_max=1 << 20)
    yield server.port
    await server.stop(0.0)


@pytest.mark.parametrize(
    ("address", "answers"),
    [
        ("127.0.0.1:{port}", True),
        ("ipv4:127.0.0.1:{port},127.0.0.2:{port}", True),
        # No server answers there, or not on every machine.
        ("localhost.:{port}", False),
        ("::1", False),
        ("baton.invalid:{port}", False),
    ],
)
async def test_no_proxy_is_asked_for_any_address(
    address: str, answers: bool, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "REPEAT_WAIT_MAX_S", 0.5)
    asked: list[asyncio.StreamReader] = []
    async with await asyncio.start_server(lambda reader, _: asked.append(reader), "127.0.0.1", 0) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
        async with asyncio.timeout(20), BatonClient(address.format(port=port)) as client:
            with contextlib.nullcontext() if answers else contextlib.suppress(BatonError):
                assert await client.models() == ["one"]
    assert asked == []


class Recorder(inference_pb2_grpc.InferenceServiceServicer):
    """Answers four requests at once. ``takes_lists``: as a server of today."""

    def __init__(self, *, takes_lists: bool) -> None:
        self.asked: list[list[str]] = []
        """Names, message by message."""
        self._takes_lists = takes_lists

    async def GenerateMany(self, requests: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateManyResponse]:  # noqa: N802
        waiting: list[str] = []
        async for message in requests:
            more = map(inference_pb2.GenerateRequest.FromString, message.generate_more)
            names = [one.request_id for one in (message.generate, *more)]
            self.asked.append(names)
            waiting += names
            if len(waiting) == 4:
                usage = inference_pb2.Usage(prompt_tokens=1)
                ended = [inference_pb2.GenerateResponse(request_id=name, usage=usage) for name in waiting]
                waiting = []
                yield inference_pb2.GenerateManyResponse(outputs=ended, takes_lists=self._takes_lists)


@pytest.mark.parametrize(
    ("takes_lists", "asked"),
    [
        (True, ["0", "1", "2", "3", "4567", "89ab"]),
        (False, [*"0123456789ab"]),
    ],
)
async def test_requests_that_are_ready_together_share_a_message_where_the_server_takes_lists(
    takes_lists: bool, asked: list[str]
) -> None:
    recorder = Recorder(takes_lists=takes_lists)

    def add_recorder(server: grpc.aio.Server) -> list[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(recorder, server)
        return [SERVICE]

    server = await start_server("127.0.0.1", 0, add_recorder, message_bytes_max=1 << 20)
    try:
        async with asyncio.timeout(20), BatonClient(f"127.0.0.1:{server.port}") as client:
            wanted = [request("x", request_id=name) for name in "0123456789ab"]
            ended = [result.request_id async for result in client.generate_many(wanted, in_flight_max=4)]
    finally:
        await server.stop(0.0)
    assert ["".join(names) for names in recorder.asked] == asked
    assert ended == [*"0123456789ab"]
