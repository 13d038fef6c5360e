"""Messages on their way to one peer."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from front_proxy.config import FrontProxyLimits
from protos.scheduler.v1.scheduler_pb2 import LeasesHeld
from runtime.failures import Failure, FailureKind
from runtime.rpc import send_queue
from runtime.rpc.bidi_stream import Stream
from runtime.rpc.send_queue import BATCH_BYTES_MAX, PATIENCE_S, WRITE_INTERVAL_S, SendQueue
from scheduler.config import SchedulerParameters
from simulation.kernel import virtual_loop
from worker.config import WorkerLimits


def said(*names: str) -> LeasesHeld:
    """A message that is a list."""
    return LeasesHeld(lease_ids=names)


def queue_of(*names: str, messages_max: int = 10) -> SendQueue[LeasesHeld]:
    queue: SendQueue[LeasesHeld] = SendQueue(messages_max)
    for name in names:
        queue.put(said(name))
    return queue


def taken(queue: SendQueue[Any]) -> list[list[str]]:
    """All that waits, list by list."""
    lists = []
    while (told := queue.take_now()) is not None:
        lists.append(list(told.lease_ids))
    return lists


class Paper:
    """A stream that keeps what is written. ``slow``: the peer takes nothing yet."""

    def __init__(self) -> None:
        self.written: list[list[str]] = []
        self.free = asyncio.Event()
        self.free.set()

    async def write(self, message: LeasesHeld) -> None:
        self.written.append(list(message.lease_ids))
        await self.free.wait()


async def test_what_waits_is_one_message_in_order_behind_the_newest_view() -> None:
    queue = queue_of("a")
    queue.show(said("old view"))
    queue.put(said("b", "c"))
    queue.show(said("new view"))
    assert await queue.take() == said("new view", "a", "b", "c")


async def test_what_was_put_is_not_changed_and_one_alone_is_not_even_copied() -> None:
    queue, kept = queue_of(), said("a")
    queue.put(kept)
    assert queue.take_now() is kept
    queue.put(kept)
    queue.put(said("b"))
    assert queue.take_now() == said("a", "b") and kept == said("a")


def test_what_arises_in_one_turn_is_one_write_and_the_next_one_leaves_an_interval_later_with_all_that_came() -> None:
    async def write() -> list[tuple[float, list[list[str]]]]:
        queue, paper = queue_of(), Paper()
        writing = asyncio.create_task(queue.write_to(cast(Stream[Any, Any], paper)))
        await asyncio.sleep(0)
        loop, seen = asyncio.get_running_loop(), []

        async def put(*names: str) -> None:
            before = len(paper.written)
            for name in names:
                queue.put(said(name))
                await asyncio.sleep(0)
            while len(paper.written) == before:
                await asyncio.sleep(WRITE_INTERVAL_S / 8)
            seen.append((loop.time(), paper.written[before:]))

        for name in "ab":
            queue.put(said(name))
        await put("c")
        await put("d", "e")
        await asyncio.sleep(1)
        await put("f")
        queue.close()
        await writing
        return [(at_s - seen[0][0], written) for at_s, written in seen]

    (_, first), (second_s, second), (third_s, third) = virtual_loop.run(write())
    assert (first, second, third) == ([["a", "b", "c"]], [["d", "e"]], [["f"]])
    assert second_s == pytest.approx(WRITE_INTERVAL_S, rel=0.3)
    assert third_s == pytest.approx(1 + second_s, rel=0.01), "after a pause it leaves at once"


async def test_what_gathers_while_the_peer_is_slow_is_one_write() -> None:
    queue, paper = queue_of(), Paper()
    writing = asyncio.create_task(queue.write_to(cast(Stream[Any, Any], paper)))
    paper.free.clear()
    for name in "def":
        queue.put(said(name))
        await asyncio.sleep(0)
    assert paper.written == [["d"]]
    paper.free.set()
    async with asyncio.timeout(5):
        while len(paper.written) < 2:
            await asyncio.sleep(0)
    assert paper.written[1:] == [["e", "f"]]
    queue.close()
    await asyncio.wait_for(writing, 5)


def test_a_patient_message_leaves_with_the_next_one_or_when_its_patience_is_over() -> None:
    async def write() -> tuple[list[list[str]], float]:
        queue, paper = queue_of(), Paper()
        writing = asyncio.create_task(queue.write_to(cast(Stream[Any, Any], paper)))
        queue.put(said("a"), patient=True)
        await asyncio.sleep(PATIENCE_S / 2)
        assert not paper.written
        queue.put(said("b"))
        await asyncio.sleep(2 * PATIENCE_S)
        began_s = asyncio.get_running_loop().time()
        queue.put(said("c"), patient=True)
        while len(paper.written) < 2:
            await asyncio.sleep(PATIENCE_S / 8)
        took_s = asyncio.get_running_loop().time() - began_s
        queue.put(said("d"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(paper.written) == 3, "a patient message makes none behind it wait"
        queue.close()
        await writing
        return paper.written, took_s

    written, took_s = virtual_loop.run(write())
    assert written == [["a", "b"], ["c"], ["d"]]
    assert took_s == pytest.approx(PATIENCE_S, rel=0.3)


@given(st.lists(st.integers(0, 60), max_size=30))
def test_no_list_is_over_its_bounds_unless_one_message_is_and_nothing_is_lost(lengths: list[int]) -> None:
    names = [f"{number:02d}{'x' * length}" for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(send_queue, "BATCH_BYTES_MAX", 50)
        patch.setattr(send_queue, "BATCH_MESSAGES_MAX", 4)
        lists = asyncio.run(_taken(names))
    assert [name for each in lists for name in each] == names
    assert all(len(each) <= 4 and (said(*each).ByteSize() <= 50 or len(each) == 1) for each in lists)
    # As few as the bounds allow: the first of a list had no room in the one before.
    for each, following in itertools.pairwise(lists):
        assert len(each) == 4 or said(*each, following[0]).ByteSize() > 50


async def _taken(names: list[str]) -> list[list[str]]:
    return taken(queue_of(*names, messages_max=30))


async def test_what_finds_no_room_is_encoded_when_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_queue, "BATCH_BYTES_MAX", 20)
    now_s = 0

    def encode(name: str) -> LeasesHeld | None:
        return said(f"{name} at {now_s}") if name != "skipped" else None

    queue = SendQueue[str](10, encode, lambda name: said(f"{name} at 0").ByteSize())
    for name in ("aaaa", "skipped", "bbbb", "cccc"):
        queue.put(name)
    assert queue.take_now() == said("aaaa at 0")
    now_s = 1
    assert taken(queue) == [["bbbb at 1"], ["cccc at 1"]]


def test_every_peer_accepts_a_whole_list() -> None:
    limits = (FrontProxyLimits(), SchedulerParameters(), WorkerLimits())
    assert all(each.message_bytes_max >= 2 * BATCH_BYTES_MAX for each in limits)


async def test_the_end_is_told_once_and_the_first_failure_counts() -> None:
    queue = queue_of("lost")
    queue.close(Failure(kind=FailureKind.UNAVAILABLE, message="first"))
    queue.close()
    queue.put(said("late"))
    queue.show(said("late"))
    assert await queue.take() is None
    assert queue.failure is not None
    assert queue.failure.message == "first"


async def test_a_peer_that_does_not_read_loses_its_stream() -> None:
    queue = queue_of("a", "b", "c", messages_max=2)
    assert queue.closed
    assert queue.failure is not None
    assert queue.failure.kind is FailureKind.EXHAUSTED
