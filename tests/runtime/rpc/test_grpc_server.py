"""gRPC plumbing: ports, readiness, reflection and size limits as a client sees them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from runtime.rpc import grpc_server
from runtime.rpc.grpc_server import ClientBounds, RunningServer
from tests.support.polling import until

MESSAGE_BYTES_MAX = 1 << 16
WAIT_S = 20.0
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def echo_service(server: grpc.aio.Server) -> Sequence[str]:
    async def echo(request: bytes, context: object) -> bytes:
        return request

    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("demo.v1.Demo", handlers),))
    return ("demo.v1.Demo",)


@contextlib.asynccontextmanager
async def served(*, clients: ClientBounds | None = None) -> AsyncIterator[tuple[RunningServer, grpc.aio.Channel]]:
    """A server, and a channel to it that carries more than the server takes."""
    server = await grpc_server.start_server(
        "127.0.0.1", 0, echo_service, message_bytes_max=MESSAGE_BYTES_MAX, clients=clients
    )
    async with grpc_server.channel(server.address, 4 * MESSAGE_BYTES_MAX) as channel:
        yield server, channel
    await server.stop(0)


async def echo(channel: grpc.aio.Channel, said: bytes) -> Any:
    call = channel.unary_unary("/demo.v1.Demo/Echo", request_serializer=None, response_deserializer=None)
    return await call(said, timeout=WAIT_S)


async def test_a_service_is_ready_only_once_it_says_so_while_the_process_is_alive_throughout() -> None:
    async def health(service: str) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S)
        return int(reply.status)

    async with served() as (server, channel):
        for serving, status in ((None, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
            if serving is not None:
                await server.set_serving(serving)
            assert (await health(""), await health("demo.v1.Demo")) == (SERVING, status)


async def test_port_zero_picks_a_port_and_a_taken_one_is_an_error() -> None:
    async with served() as (server, _):
        assert server.port > 0
        assert server.address == f"127.0.0.1:{server.port}"
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            await grpc_server.start_server("127.0.0.1", server.port, echo_service, message_bytes_max=1)


async def test_reflection_lists_the_services() -> None:
    async with served() as (_, channel):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=WAIT_S)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        await call.done_writing()
    names = {service.name for service in reply.list_services_response.service}
    assert names == {"demo.v1.Demo", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_a_message_over_the_limit_is_refused_and_one_under_it_passes() -> None:
    async with served() as (_, channel):
        most = b"x" * (MESSAGE_BYTES_MAX - 1)
        assert await echo(channel, most) == most
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await echo(channel, most + b"xx")
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_connections_beyond_a_servers_bound_are_closed_and_the_others_served() -> None:
    async with served(clients=ClientBounds(connections_max=2, streams_max=10)) as (server, channel):
        assert await echo(channel, b"x") == b"x"
        opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(4)]
        endings = [asyncio.create_task(_end(reader)) for reader, _ in opened]
        await until(lambda: sum(ending.done() for ending in endings) == 3, within_s=WAIT_S)
        assert await echo(channel, b"x") == b"x"
    for _, writer in opened:
        writer.close()
    await asyncio.wait_for(asyncio.gather(*endings), WAIT_S)


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))])
async def test_a_connection_on_which_nothing_is_asked_ends_and_a_client_may_ask_again(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "HANDSHAKE_TIMEOUT_MS", 200)
    monkeypatch.setattr(grpc_server, "CONNECTION_IDLE_MAX_MS", 200)
    async with served(clients=ClientBounds(connections_max=10, streams_max=10)) as (server, channel):
        assert await echo(channel, b"x") == b"x"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(said)
        await asyncio.wait_for(_end(reader), WAIT_S)
        writer.close()
        assert await echo(channel, b"x") == b"x"


async def _end(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionResetError):
        while await reader.read(4096):
            pass


def test_an_ipv6_host_is_bracketed() -> None:
    assert grpc_server.join_address("::1", 80) == "[::1]:80"
    assert grpc_server.join_address("localhost", 80) == "localhost:80"
