"""The Python client and the proxy that the environment names."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from front_proxy.grpc_api.client import BatonClient
from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from runtime.rpc.grpc_server import start_server

WAIT_S = 20.0


class Models(inference_pb2_grpc.InferenceServiceServicer):
    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:  # noqa: N802
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="one")])


def add(server: grpc.aio.Server) -> Sequence[str]:
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Models(), server)
    return ["baton.inference.v1.InferenceService"]


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = await start_server("127.0.0.1", 0, add, message_bytes_max=1 << 20)
    yield server.port
    await server.stop(0.0)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "dns:///localhost", "ipv4:127.0.0.1"])
async def test_a_proxy_is_never_asked_for_this_machine(
    address: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as refuses:
        refuses.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{refuses.getsockname()[1]}")
        async with asyncio.timeout(WAIT_S), BatonClient(f"{address}:{port}") as client:
            assert await client.models() == ["one"]


async def test_a_proxy_is_asked_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(await reader.readline())
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with BatonClient("192.0.2.1:50051") as client:
            asking = asyncio.create_task(client.models())
            assert await asyncio.wait_for(asked.get(), WAIT_S) == b"CONNECT 192.0.2.1:50051 HTTP/1.1\r\n"
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
