"""Messages on their way to one peer."""

from __future__ import annotations

import asyncio

from runtime.failures import Failure, FailureKind
from runtime.rpc.send_queue import SendQueue


async def test_messages_arrive_in_order_and_only_the_newest_view() -> None:
    queue: SendQueue[str] = SendQueue(10)
    queue.put("a")
    queue.show("old view")
    queue.put("b")
    queue.show("new view")
    assert [await queue.take() for _ in range(3)] == ["new view", "a", "b"]


async def test_a_waiting_reader_is_woken() -> None:
    queue: SendQueue[str] = SendQueue(10)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        taken = group.create_task(queue.take())
        await asyncio.sleep(0)
        queue.put("a")
    assert taken.result() == "a"


async def test_the_end_is_told_once_and_the_first_failure_counts() -> None:
    queue: SendQueue[str] = SendQueue(10)
    queue.put("lost")
    queue.close(Failure(kind=FailureKind.UNAVAILABLE, message="first"))
    queue.close()
    queue.put("late")
    queue.show("late")
    assert await queue.take() is None
    assert queue.failure is not None
    assert queue.failure.message == "first"


async def test_a_peer_that_does_not_read_loses_its_stream() -> None:
    queue: SendQueue[str] = SendQueue(2)
    for message in "abc":
        queue.put(message)
    assert queue.closed
    assert queue.failure is not None
    assert queue.failure.kind is FailureKind.EXHAUSTED
