"""The Python client and the proxy that the environment names."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from front_proxy.grpc_api.client import BatonClient, BatonError
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


class Proxy:
    """What the environment names as a proxy: it notes what it is asked for, and hangs up."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.put_nowait(await reader.readline())
        writer.close()


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    proxy = Proxy()
    async with await asyncio.start_server(proxy.take, "127.0.0.1", 0) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield proxy


@pytest.mark.parametrize(
    ("address", "answers"),
    [
        ("127.0.0.1:{port}", True),
        ("localhost:{port}", True),
        ("localhost.:{port}", False),
        ("dns:///localhost:{port}", True),
        ("ipv4:127.0.0.1:{port}", True),
        ("ipv4:127.0.0.1:{port},127.0.0.2:{port}", True),
        ("::1", False),
        ("[::1]:{port}", False),
    ],
)
async def test_a_proxy_is_never_asked_for_this_machine(address: str, answers: bool, port: int, proxy: Proxy) -> None:
    async with asyncio.timeout(WAIT_S), BatonClient(address.format(port=port)) as client:
        # Whether a machine knows the others is for its own configuration to say.
        with contextlib.nullcontext() if answers else contextlib.suppress(BatonError):
            assert await client.models() == ["one"]
    assert proxy.asked.empty()


async def test_a_proxy_is_asked_for_another_machine(proxy: Proxy) -> None:
    async with BatonClient("192.0.2.1:50051") as client:
        asking = asyncio.create_task(client.models())
        assert await asyncio.wait_for(proxy.asked.get(), WAIT_S) == b"CONNECT 192.0.2.1:50051 HTTP/1.1\r\n"
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
