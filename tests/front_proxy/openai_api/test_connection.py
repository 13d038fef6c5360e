"""A real connection whose client does not read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.responses import StreamingResponse

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.in_flight import InFlight
from front_proxy.openai_api.published import PublishedApp
from front_proxy.openai_api.server import OpenAiServer

REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
CHUNK = b"x" * (1 << 20)


class Endless:
    """An app that streams until its client has left."""

    def __init__(self, chunks: int) -> None:
        self.app = FastAPI()
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self._chunks = chunks
        self.app.add_api_route("/v1/completions", self.complete, methods=["POST"])

    async def complete(self) -> StreamingResponse:
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> Any:
        self.begun.set()
        try:
            for _ in range(self._chunks):
                yield CHUNK
        finally:
            self.ended.set()


@asynccontextmanager
async def unread(chunks: int, **limits: Any) -> AsyncIterator[tuple[Endless, InFlight, OpenAiServer, socket.socket]]:
    """A client that asked and has not read anything yet."""
    endless = Endless(chunks)
    in_flight = InFlight(1, usable=lambda: True, retry_after_s=1.0)
    bounds = FrontProxyLimits(close_timeout_s=1, **limits)
    app = PublishedApp(endless.app)
    server = OpenAiServer(app, FrontProxyConfig(port=0), in_flight, lifespan="off", limits=bounds)
    await server.start()
    host, _, port = server.address.rpartition(":")
    with socket.socket() as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, REQUEST)
        async with asyncio.timeout(30):
            await endless.begun.wait()
            assert in_flight.count == 1
            yield endless, in_flight, server, client
    await server.stop()


async def test_a_client_that_reads_nothing_loses_its_connection_and_its_place() -> None:
    async with unread(1000, client_send_timeout_s=0.1) as (endless, in_flight, server, _):
        await endless.ended.wait()
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
