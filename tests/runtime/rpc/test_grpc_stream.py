"""Streams over real gRPC on the loopback interface: both ends, and every way in which a stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import Dial, ServerStream, StreamBroken, first
from runtime.rpc.grpc_server import start_server
from runtime.rpc.grpc_stream import GrpcServerStream, grpc_dial
from runtime.rpc.send_queue import SendQueue, exchange

WAIT_S = 20.0
MESSAGE_BYTES_MAX = 1 << 20
Serve = Callable[[ServerStream[bytes, bytes]], Awaitable[None]]


def begin(channel: Any) -> Any:
    return channel.stream_stream("/demo.v1.Demo/Talk")()


DIAL: Dial = grpc_dial(begin, message_bytes_max=MESSAGE_BYTES_MAX)


@asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[str]:
    async def talk(_requests: object, context: Any) -> None:
        await serve(GrpcServerStream(context))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        handlers = {"Talk": grpc.stream_stream_rpc_method_handler(talk)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("demo.v1.Demo", handlers),))
        return ("demo.v1.Demo",)

    server = await start_server("127.0.0.1", 0, add, message_bytes_max=MESSAGE_BYTES_MAX)
    try:
        async with asyncio.timeout(WAIT_S):
            yield server.address
    finally:
        await server.stop(0)


async def echo(stream: ServerStream[bytes, bytes]) -> None:
    while (message := await stream.read()) is not None:
        await stream.write(message)


async def test_messages_go_both_ways_and_the_stream_ends_well() -> None:
    async with served(echo) as address, DIAL(address) as stream:
        await stream.write(b"a")
        assert await stream.read() == b"a"
        await stream.done_writing()
        assert await stream.read() is None


async def test_a_refusal_is_the_reason_for_the_reader_and_for_the_writer() -> None:
    async def refuse(stream: ServerStream[bytes, bytes]) -> None:
        await stream.refuse(Failure(kind=FailureKind.EXHAUSTED, message="full"))

    async with served(refuse) as address, DIAL(address) as stream:
        with pytest.raises(StreamBroken, match="RESOURCE_EXHAUSTED: full"):
            await stream.read()
        with pytest.raises(StreamBroken, match="RESOURCE_EXHAUSTED: full"):
            await stream.write(b"too late")


async def test_a_peer_that_says_nothing_breaks_the_stream_as_silent() -> None:
    async def listen(stream: ServerStream[bytes, bytes]) -> None:
        await stream.read()

    async with served(listen) as address, DIAL(address) as stream:
        with pytest.raises(StreamBroken) as broken:
            await first(stream, timeout_s=0.05)
        assert broken.value.silent


async def test_an_address_without_a_server_breaks_the_stream_and_not_as_silent() -> None:
    async with DIAL("127.0.0.1:1") as stream:
        with pytest.raises(StreamBroken, match="UNAVAILABLE") as broken:
            await first(stream, timeout_s=WAIT_S)
        assert not broken.value.silent


async def test_when_the_client_leaves_the_handler_learns_of_it() -> None:
    gone = asyncio.Event()

    async def listen(stream: ServerStream[bytes, bytes]) -> None:
        try:
            await stream.write(b"opened")
            assert await stream.read() is None
        finally:
            gone.set()

    async with served(listen) as address:
        async with DIAL(address) as stream:
            assert await stream.read() == b"opened"
        await gone.wait()


async def test_an_exchange_encodes_what_leaves_and_hears_what_comes() -> None:
    queue: SendQueue[int] = SendQueue(10, lambda number: None if number == 2 else str(number).encode(), int)
    heard: list[bytes] = []

    def hear(message: bytes) -> None:
        heard.append(message)
        if message == b"3":
            queue.close(Failure(kind=FailureKind.UNAVAILABLE, message="done"))

    for number in (2, 3):
        queue.put(number)
    async with served(echo) as address:
        ended = await exchange(
            DIAL,
            address,
            queue,
            opening=b"hello",
            on_message=hear,
            first_timeout_s=WAIT_S,
        )
    assert (heard, str(ended)) == ([b"hello", b"3"], "done")


async def test_an_exchange_ends_with_the_reason_of_its_peer_and_closes_the_queue() -> None:
    async def refuse(stream: ServerStream[bytes, bytes]) -> None:
        await stream.read()
        await stream.refuse(Failure(kind=FailureKind.INCOMPATIBLE, message="too old"))

    queue: SendQueue[bytes] = SendQueue(10)
    async with served(refuse) as address:
        ended = await exchange(DIAL, address, queue, opening=b"hello", on_message=print, first_timeout_s=WAIT_S)
    assert "too old" in str(ended) and queue.closed
    assert not queue.put(b"more")


async def test_a_bug_in_an_exchange_is_raised() -> None:
    queue: SendQueue[bytes] = SendQueue(10)

    def bug(message: bytes) -> None:
        raise ZeroDivisionError(message)

    async with served(echo) as address:
        with pytest.raises(ZeroDivisionError):
            await exchange(DIAL, address, queue, opening=b"hello", on_message=bug, first_timeout_s=WAIT_S)
