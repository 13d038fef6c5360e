"""No token beyond a grant reaches the reader; A1's bound at the front proxy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from front_proxy.dispatch.grant_meter import GrantMeter
from front_proxy.request.bill import Bill, Part
from front_proxy.request.generation import GenerationDelta


class Stage:
    """A meter between a flow and a reader, and a scheduler that answers when it is told to."""

    def __init__(self, granted: int = 8, most: int = 100, *, away: int = 0) -> None:
        bill = Bill(b"u" * 16, key_id="", team="a", model="demo", api="", wall_s=0.0)
        self.part: Part = bill.part(3)
        self.part.most = most
        self.part.grant(granted)
        self.given: list[GenerationDelta] = []
        self.asked: list[int] = []
        self.stopped = 0
        self.away = away
        self.meter = GrantMeter(self.part, self, give=self.given.append, stop=self._stop, patience_s=0.02)

    def _stop(self) -> None:
        self.stopped += 1

    def extend(self, part: Part) -> None:
        self.asked.append(part.granted)

    def grant_away(self, part: Part) -> bool:
        if self.away:
            part.grant(part.granted + self.away)
        return bool(self.away)

    def answer(self, tokens: int) -> None:
        self.part.answer(tokens, self.asked[-1])
        self.part.on_change()

    def make(self, count: int, **facts: Any) -> None:
        if facts or not self.meter.covers(count):
            self.meter.pass_on(GenerationDelta(token_ids=list(range(count)), **facts))
        else:
            self.given.append(GenerationDelta(token_ids=list(range(count))))

    @property
    def tokens(self) -> int:
        return sum(len(delta.token_ids) for delta in self.given)


async def test_more_is_asked_for_when_half_is_given_and_once() -> None:
    one = Stage()
    for _ in range(4):
        one.make(1)
    assert one.asked == []
    for _ in range(4):
        one.make(1)
    assert one.asked == [8] and one.tokens == 8
    one.answer(16)
    for _ in range(8):
        one.make(1)
    assert one.asked == [8, 16] and one.tokens == 16


async def test_what_is_beyond_waits_for_the_answer() -> None:
    one = Stage()
    one.make(6)
    one.make(6)
    assert one.tokens == 6 and one.asked == [8]
    one.answer(16)
    assert one.tokens == 12 and not one.stopped


async def test_where_there_is_no_more_the_output_ends_with_its_last_granted_token() -> None:
    one = Stage()
    one.make(6)
    one.make(6)
    one.answer(8)
    assert (one.tokens, one.stopped) == (8, 1)
    last = one.given[-1]
    assert last.finish is not None and last.finish.reason == "length" and len(last.token_ids) == 2
    assert "budget" in one.part.bill.ended


async def test_an_output_that_fits_its_first_grant_asks_nothing() -> None:
    one = Stage(granted=5, most=5)
    one.make(5)
    assert one.asked == [] and one.tokens == 5


@pytest.mark.parametrize(("away", "tokens", "stopped"), [(8, 12, 0), (0, 8, 1)])
async def test_without_an_answer_it_goes_on_or_ends_as_the_operator_wants(away: int, tokens: int, stopped: int) -> None:
    one = Stage(away=away)
    one.make(6)
    one.make(6)
    assert one.tokens == 6
    async with asyncio.timeout(5):
        while not (one.stopped or one.tokens > 8):
            await asyncio.sleep(0.005)
    assert (one.tokens, one.stopped) == (tokens, stopped)


@given(st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["more", "no"])), max_size=40))
def test_no_more_is_given_than_was_granted_in_any_order(events: list[int | str]) -> None:
    async def run() -> None:
        one = Stage()
        made = 0
        for event in events:
            if one.stopped:
                break
            if isinstance(event, int):
                one.make(event)
                made += event
            elif one.part.waits:
                one.answer(one.part.granted + (8 if event == "more" else 0))
            assert one.tokens == one.part.shown <= one.part.granted
            assert one.tokens <= made
        one.meter.close()

    asyncio.run(run())
