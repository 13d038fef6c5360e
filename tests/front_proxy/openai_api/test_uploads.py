"""Bodies that do not come, come slowly, or are too many: who gives way, and who does not."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from fastapi import Request

from front_proxy.config import FrontProxyLimits
from front_proxy.openai_api.uploads import BodyRefused, Uploads
from tests.front_proxy.openai_api.small_app import connect, serving
from tests.support.polling import until
from tests.support.stream_bounds import room

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


async def test_a_body_has_a_last_moment_however_much_of_it_is_here() -> None:
    uploads = Uploads(1 << 20, FrontProxyLimits(request_body_timeout_s=0.05))
    for begun in (b"", b"x" * 1000):
        assert await Body(uploads, "a", begun).why() == "slow_body"


async def answer(request: Request) -> Any:
    return await request.json()


def sent(path: str, body: bytes, *, of_bytes: int) -> bytes:
    """A request, and so much of its body."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {of_bytes}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("begun", [b"", b"{"])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/messages/count_tokens"])
async def test_a_thousand_stuck_uploads_take_nothing_from_those_that_ask(path: str, begun: bytes) -> None:
    in_flight = room(2)
    async with serving({"/v1/completions": answer, path: answer}, in_flight, uploads_max=8) as server:
        stuck = [await connect(server) for _ in range(20)]
        endings = [asyncio.create_task(reader.read()) for reader, _ in stuck]
        for _, writer in stuck:
            writer.write(sent(path, begun, of_bytes=100))
        await until(lambda: sum(ending.done() for ending in endings) == 12, within_s=WAIT_S)
        assert all(ending.result().startswith(b"HTTP/1.1 408 ") for ending in endings if ending.done())
        reader, writer = await connect(server)
        writer.write(sent("/v1/completions", b"{}", of_bytes=2))
        answered = await asyncio.wait_for(reader.read(), WAIT_S)
        assert answered.startswith(b"HTTP/1.1 200 "), answered
        assert in_flight.count == 0
        for each in (writer, *(writer for _, writer in stuck)):
            each.close()
        await asyncio.gather(*endings)


async def test_while_there_is_no_place_no_body_is_waited_for_and_one_that_is_here_by_then_gets_none() -> None:
    in_flight = room(1)
    async with serving({"/v1/completions": answer}, in_flight) as server, asyncio.timeout(WAIT_S):
        early, writer = await connect(server)
        writer.write(sent("/v1/completions", b"{", of_bytes=2))
        await until(lambda: server.guard._uploads._count, within_s=WAIT_S)
        place = in_flight.enter()
        late, other = await connect(server)
        other.write(sent("/v1/completions", b"{", of_bytes=2))
        assert (await late.read()).startswith(b"HTTP/1.1 429 ")
        writer.write(b"}")
        assert (await early.read()).startswith(b"HTTP/1.1 429 ")
        assert in_flight.count == 1
        place.leave()
        for each in (writer, other):
            each.close()
