"""A real connection whose client does not read, or does not ask."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.responses import StreamingResponse

from front_proxy.gateway.in_flight import InFlight
from front_proxy.gateway.metrics import CONNECTIONS_REFUSED
from front_proxy.openai_api.server import OpenAiServer
from tests.front_proxy.openai_api.small_app import REQUEST, connect, serving
from tests.support.stream_bounds import room

CHUNK = b"x" * (1 << 20)


@asynccontextmanager
async def unread(
    chunks: int, **limits: Any
) -> AsyncIterator[tuple[asyncio.Event, InFlight, OpenAiServer, socket.socket]]:
    """A client that asked for so many chunks and has not read anything yet. The event: its stream has ended."""
    begun, ended, in_flight = asyncio.Event(), asyncio.Event(), room(1)

    async def stream() -> AsyncIterator[bytes]:
        begun.set()
        try:
            for _ in range(chunks):
                yield CHUNK
        finally:
            ended.set()

    async def complete() -> StreamingResponse:
        return StreamingResponse(stream(), media_type="text/event-stream")

    async with serving({"/v1/completions": complete}, in_flight, **limits) as server:
        host, _, port = server.address.rpartition(":")
        with socket.socket() as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, REQUEST)
            async with asyncio.timeout(30):
                await begun.wait()
                assert in_flight.count == 1
                yield ended, in_flight, server, client


async def test_a_client_that_reads_nothing_loses_its_connection_and_its_place() -> None:
    async with unread(1000, client_send_timeout_s=0.1) as (ended, in_flight, server, _):
        await ended.wait()
        await in_flight.idle.wait()
        await server.quiet()


async def test_a_client_that_reads_late_gets_everything() -> None:
    async with unread(40) as (_, in_flight, _, client):
        got = 0
        while got < 40 * len(CHUNK):
            piece = await asyncio.get_running_loop().sock_recv(client, 1 << 20)
            assert piece
            got += len(piece)
        await in_flight.idle.wait()


REFUSED = b"POST /v1/nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "then", "answer"),
    [
        (b"", b"", b""),
        (b"POST /v1/comp", b"letions", b""),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n", b""),
        # uvicorn's keep-alive time is over for good with the first byte that comes after an answer.
        (REFUSED, b"x", b"HTTP/1.1 404 "),
    ],
)
async def test_a_client_that_asks_nothing_more_loses_its_connection_and_one_that_waits_does_not(
    said: bytes, then: bytes, answer: bytes
) -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def late() -> None:
        asked.set()
        await may_answer.wait()

    bounds = {"headers_timeout_s": 0.1, "keep_alive_timeout_s": 1000}
    async with serving({"/v1/completions": late}, **bounds) as server, asyncio.timeout(30):
        waits, writer = await connect(server)
        writer.write(REQUEST)
        await asked.wait()
        reader, idle = await connect(server)
        idle.write(said)
        if answer:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(answer)
        idle.write(then)
        await reader.read()
        may_answer.set()
        assert (await waits.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        for each in (idle, writer):
            each.close()


IN_CHUNKS = b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (b"GET /health HTTP/1.1\r\na: ", b"x" * 5000),
        (b"GET /health HTTP/1.1\r\n", b"a: b\r\n" * 1000),
        (b"GET /", b"x" * 5000),
        # Trailers, which are headers behind a body in chunks.
        (REQUEST.replace(b"content-length: 2\r\n\r\n{}", IN_CHUNKS), b"a: b\r\n" * 1000),
    ],
)
async def test_headers_without_end_are_not_kept(begun: bytes, more: bytes) -> None:
    refused = CONNECTIONS_REFUSED.labels("long_headers")
    before = refused._value.get()
    async with serving({}, headers_bytes_max=20_000) as server, asyncio.timeout(30):
        reader, writer = await connect(server)
        ending = asyncio.create_task(reader.read())
        writer.write(begun)
        with contextlib.suppress(ConnectionError):
            while not ending.done():
                writer.write(more)
                await writer.drain()
                await asyncio.sleep(0)
        await asyncio.gather(ending, return_exceptions=True)
        writer.close()
    assert refused._value.get() == before + 1
