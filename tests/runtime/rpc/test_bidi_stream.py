"""How the parts of a stream end together."""

from __future__ import annotations

import asyncio

import pytest

from runtime.rpc.bidi_stream import StreamBroken, converse


async def forever(ended: list[str], name: str) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append(name)


async def fail(error: Exception) -> None:
    raise error


async def test_when_one_part_ends_the_others_are_ended() -> None:
    ended: list[str] = []
    await converse(forever(ended, "reader"), asyncio.sleep(0), forever(ended, "writer"), end_timeout_s=5)
    assert sorted(ended) == ["reader", "writer"]


async def test_of_two_broken_parts_the_first_one_says_why() -> None:
    with pytest.raises(StreamBroken, match="refused"):
        await converse(fail(StreamBroken("refused")), fail(StreamBroken("over")), end_timeout_s=5)


async def test_a_bug_is_raised_before_a_broken_stream() -> None:
    with pytest.raises(ZeroDivisionError):
        await converse(fail(StreamBroken("refused")), fail(ZeroDivisionError()), end_timeout_s=5)


async def test_a_cancelled_conversation_ends_its_parts() -> None:
    ended: list[str] = []
    talk = asyncio.create_task(converse(forever(ended, "a"), forever(ended, "b"), end_timeout_s=5))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    talk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await talk
    assert sorted(ended) == ["a", "b"]


async def test_a_part_that_does_not_end_is_left_behind_in_time(caplog: pytest.LogCaptureFixture) -> None:
    let_go = asyncio.Event()

    async def stubborn() -> None:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue

    await converse(stubborn(), asyncio.sleep(0.01), end_timeout_s=0.01)
    assert "did not end in time" in caplog.text
    let_go.set()
