"""A real connection whose client does not read."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from fastapi import FastAPI
from starlette.responses import StreamingResponse

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.openai_api.server import OpenAiServer
from tests.polling import until

REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
CHUNK = b"x" * (1 << 20)


LIMITS = FrontProxyLimits(close_timeout_s=1)


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


async def connected(server: OpenAiServer) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    client = socket.socket()
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (host, int(port)))
    await loop.sock_sendall(client, REQUEST)
    return client


async def test_a_client_that_reads_nothing_loses_its_connection_and_its_place() -> None:
    endless = Endless(chunks=1000)
    config = FrontProxyConfig(port=0, client_send_timeout_s=0.1)
    server = OpenAiServer(endless.app, config, lifespan="off", limits=LIMITS)
    await server.start()
    try:
        client = await connected(server)
        async with asyncio.timeout(30):
            await endless.begun.wait()
            assert server.guard.requests_running == 1
            await endless.ended.wait()
            await server.guard.idle.wait()
        assert not server.guard.requests_running
        await until(lambda: not server.connected, within_s=30)
        client.close()
    finally:
        await server.stop()


async def test_a_client_that_reads_late_gets_everything() -> None:
    endless = Endless(chunks=40)
    server = OpenAiServer(endless.app, FrontProxyConfig(port=0), lifespan="off", limits=LIMITS)
    await server.start()
    try:
        client = await connected(server)
        async with asyncio.timeout(30):
            await endless.begun.wait()
            got = 0
            while got < 40 * len(CHUNK):
                piece = await asyncio.get_running_loop().sock_recv(client, 1 << 20)
                assert piece
                got += len(piece)
            await server.guard.idle.wait()
        client.close()
    finally:
        await server.stop()
