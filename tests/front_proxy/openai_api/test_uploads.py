"""Bodies that do not come, come slowly, or are too many: who gives way, and who does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from fastapi import FastAPI, Request

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.in_flight import InFlight
from front_proxy.openai_api.published import PublishedApp
from front_proxy.openai_api.server import OpenAiServer
from front_proxy.openai_api.uploads import BodyRefused, Uploads
from tests.support.polling import until

WAIT_S = 10.0


class Body:
    """One body on its way from ``address``. It sends what the test says, and then stands still."""

    def __init__(self, uploads: Uploads, address: str, *pieces: bytes) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._waits = asyncio.Event()
        for piece in pieces:
            self.send(piece)
        self.read = asyncio.create_task(uploads.read(self._receive, address, 0))

    def send(self, piece: bytes, *, last: bool = False) -> None:
        self._waits.clear()
        self._messages.put_nowait({"type": "http.request", "body": piece, "more_body": not last})

    async def stands(self) -> None:
        """Wait until all that was sent is read."""
        await asyncio.wait_for(self._waits.wait(), WAIT_S)

    async def why(self) -> str:
        with pytest.raises(BodyRefused) as raised:
            await asyncio.wait_for(self.read, WAIT_S)
        assert raised.value.status == 408
        return raised.value.reason

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._messages.empty():
            self._waits.set()
        return await self._messages.get()


async def test_one_body_too_many_and_the_address_with_most_loses_the_one_that_came_least_far() -> None:
    uploads = Uploads(1 << 20, FrontProxyLimits(uploads_max=4))
    others = Body(uploads, "other", b"x")
    far = Body(uploads, "many", b"x" * 10_000)
    await far.stands()
    near = [Body(uploads, "many", b""), Body(uploads, "many", b"")]
    for body in near:
        await body.stands()
    new = Body(uploads, "new", b"x")
    assert await near[0].why() == "uploads"
    # Also where it is that address itself that comes again.
    again = Body(uploads, "many", b"x")
    assert await near[1].why() == "uploads"
    for body in (others, far, new, again):
        body.send(b"y", last=True)
        assert (await asyncio.wait_for(body.read, WAIT_S)).endswith(b"xy")


async def test_too_many_bytes_and_the_address_with_most_loses_its_largest_body() -> None:
    uploads = Uploads(60, FrontProxyLimits(uploads_bytes_max=100))
    large, small, other = Body(uploads, "a", b"x" * 50), Body(uploads, "a", b"x" * 10), Body(uploads, "b", b"x" * 40)
    for body in (large, small, other):
        await body.stands()
    small.send(b"x")
    assert await large.why() == "uploads"
    small.send(b"x", last=True)
    other.send(b"x" * 20, last=True)
    assert [len(await asyncio.wait_for(body.read, WAIT_S)) for body in (small, other)] == [12, 60]
    assert (uploads._count, uploads._bytes, uploads._of) == (0, 0, {})


async def test_a_body_may_take_its_time_if_it_keeps_a_pace() -> None:
    uploads = Uploads(1 << 20, FrontProxyLimits(upload_grace_s=0.05, upload_bytes_per_s_min=1000))
    paced, stalled = Body(uploads, "a", b"x" * 100_000), Body(uploads, "a", b"x")
    assert await stalled.why() == "slow_body"
    paced.send(b"x", last=True)
    assert len(await asyncio.wait_for(paced.read, WAIT_S)) == 100_001


async def test_however_fast_it_is_a_body_has_a_last_moment() -> None:
    uploads = Uploads(1 << 20, FrontProxyLimits(request_body_timeout_s=0.05, upload_bytes_per_s_min=1))
    assert await Body(uploads, "a", b"x" * 1000).why() == "slow_body"


@pytest.mark.parametrize("begun", [b"", b"{"])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/messages/count_tokens"])
async def test_a_thousand_stuck_uploads_take_nothing_from_those_that_ask(path: str, begun: bytes) -> None:
    app = FastAPI()

    async def answer(request: Request) -> Any:
        return await request.json()

    for route in ("/v1/completions", path):
        app.add_api_route(route, answer, methods=["POST"])
    in_flight = InFlight(2, usable=lambda: True, retry_after_s=1.0)
    limits = FrontProxyLimits(uploads_max=8, close_timeout_s=1)
    server = OpenAiServer(PublishedApp(app), FrontProxyConfig(port=0), in_flight, lifespan="off", limits=limits)
    await server.start()
    host, _, port = server.address.rpartition(":")
    stuck = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
    endings = [asyncio.create_task(reader.read()) for reader, _ in stuck]
    for _, writer in stuck:
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n".encode() + begun)
    await until(lambda: sum(ending.done() for ending in endings) == 12, within_s=WAIT_S)
    assert all(ending.result().startswith(b"HTTP/1.1 408 ") for ending in endings if ending.done())
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": "a"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    answered = await asyncio.wait_for(reader.read(), WAIT_S)
    assert answered.startswith(b"HTTP/1.1 200 "), answered
    assert in_flight.count == 0
    for each in (writer, *(writer for _, writer in stuck)):
        each.close()
    await asyncio.gather(*endings)
    await server.stop()
