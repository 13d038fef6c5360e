"""Messages on their way to one peer."""

from __future__ import annotations

import asyncio

from runtime.failures import Failure, FailureKind
from scheduler.send_queue import Outgoing


async def test_messages_arrive_in_order_and_only_the_newest_view() -> None:
    outgoing: Outgoing[str] = Outgoing(10)
    outgoing.put("a")
    outgoing.show("old view")
    outgoing.put("b")
    outgoing.show("new view")
    assert [await outgoing.take() for _ in range(3)] == ["new view", "a", "b"]


async def test_a_waiting_reader_is_woken() -> None:
    outgoing: Outgoing[str] = Outgoing(10)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        taken = group.create_task(outgoing.take())
        await asyncio.sleep(0)
        outgoing.put("a")
    assert taken.result() == "a"


async def test_the_end_is_told_once_and_the_first_verdict_counts() -> None:
    outgoing: Outgoing[str] = Outgoing(10)
    outgoing.put("lost")
    outgoing.close(Failure(kind=FailureKind.UNAVAILABLE, message="first"))
    outgoing.close()
    outgoing.put("late")
    outgoing.show("late")
    assert await outgoing.take() is None
    assert outgoing.verdict is not None
    assert outgoing.verdict.message == "first"


async def test_a_peer_that_does_not_read_loses_its_stream() -> None:
    outgoing: Outgoing[str] = Outgoing(2)
    for message in "abc":
        outgoing.put(message)
    assert outgoing.closed
    assert outgoing.verdict is not None
    assert outgoing.verdict.kind is FailureKind.EXHAUSTED
