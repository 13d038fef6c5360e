"""Messages arrive whole and in order, a wait ends with its task, and closing leaves no descriptor watched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

pytest.importorskip("zmq")

import zmq
import zmq.asyncio

from engine.vllm.fast_receiver import FastZmqReceiver

WAIT_S = 20.0


class Pipe(NamedTuple):
    reader: zmq.asyncio.Socket
    writer: zmq.Socket[bytes]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    with zmq.asyncio.Context() as context, zmq.Context() as other:
        reader, writer = context.socket(zmq.PULL), other.socket(zmq.PUSH)
        port = reader.bind_to_random_port("tcp://127.0.0.1")
        writer.connect(f"tcp://127.0.0.1:{port}")
        yield Pipe(reader, writer)
        writer.close(linger=0)
        reader.close(linger=0)


async def test_every_message_comes_once_and_in_order_however_they_arrive(pipe: Pipe) -> None:
    FastZmqReceiver(pipe.reader)

    def write() -> None:
        for number in range(5000):
            pipe.writer.send_multipart([b"%d" % number, b"frame"])
            if number % 97 == 0:
                threading.Event().wait(0.001)

    writing = threading.Thread(target=write)
    writing.start()
    async with asyncio.timeout(WAIT_S):
        for number in range(5000):
            first, second = await pipe.reader.recv_multipart(copy=False)
            assert (bytes(first.buffer), bytes(second.buffer)) == (b"%d" % number, b"frame")
    writing.join(WAIT_S)


async def test_a_message_that_was_there_before_anybody_asked_is_not_missed(pipe: Pipe) -> None:
    pipe.writer.send_multipart([b"early"])
    FastZmqReceiver(pipe.reader)
    async with asyncio.timeout(WAIT_S):
        assert await pipe.reader.recv_multipart() == [b"early"]


async def test_a_wait_that_was_cancelled_loses_nothing(pipe: Pipe) -> None:
    FastZmqReceiver(pipe.reader)
    waiting = asyncio.ensure_future(pipe.reader.recv_multipart())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    pipe.writer.send_multipart([b"next"])
    async with asyncio.timeout(WAIT_S):
        assert await pipe.reader.recv_multipart() == [b"next"]


async def test_closing_stops_watching_and_may_be_repeated(pipe: Pipe) -> None:
    FastZmqReceiver(pipe.reader)
    descriptor = pipe.reader.fileno()
    pipe.reader.close(linger=0)
    pipe.reader.close(linger=0)
    assert pipe.reader.closed
    assert not asyncio.get_running_loop().remove_reader(descriptor)
    with pytest.raises(zmq.ZMQError):
        await pipe.reader.recv_multipart()
