"""A recording of traffic: which requests become records, and what bounds it."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.failures import Failure, FailureKind
from scheduler.api.actions import ReplyRefusal
from scheduler.api.events import Event, FrontLeft, PlanRequested, RequestEnded, Tick
from scheduler.trace_feed import BATCH_BYTES, RECORD_BYTES, TraceFeed

KEYS = bytes(range(64))


def asked(plan_id: int, **more: Any) -> PlanRequested:
    fields: dict[str, Any] = {"session": 1, "prompt_tokens": 100, "output_tokens_max": 50, "block_keys": KEYS, **more}
    return PlanRequested(plan_id=plan_id, request_id=f"r{plan_id}", **fields)


def ended(plan_id: int, output_tokens: int = 7, outcome: str = "finished", session: int = 1) -> RequestEnded:
    return RequestEnded(session=session, plan_id=plan_id, outcome=outcome, output_tokens=output_tokens)


def refused(plan_id: int) -> ReplyRefusal:
    return ReplyRefusal(
        session=1, plan_id=plan_id, failure=Failure(kind=FailureKind.EXHAUSTED, message="Full."), cause="queue_full"
    )


def play(feed: TraceFeed, *events: Event, at_s: float = 10.0) -> None:
    for event in events:
        feed.follow(event, (), at_s)


def test_a_record_has_the_arrival_of_the_question_and_the_output_of_the_end() -> None:
    feed = TraceFeed(began_s=10.0)
    play(feed, asked(1, tenant="name-a", priority=-3), at_s=12.5)
    assert feed.take() == []
    play(feed, ended(1, 9), at_s=20.0)
    [record] = feed.take()
    assert (record.arrived_s, record.prompt_tokens, record.output_tokens) == (2.5, 100, 9)
    assert (record.block_keys, record.priority_class, record.tenant) == (KEYS, "interactive", "name-a")
    assert (feed.asked, feed.dropped) == (1, 0)


@pytest.mark.parametrize("end", [ended(1, 3, "failed"), ended(1, 0, "cancelled"), ended(1, 0), FrontLeft(session=1)])
def test_what_gave_no_output_that_could_be_replayed_is_no_record_and_holds_nothing(end: Event) -> None:
    feed = TraceFeed(began_s=0.0)
    play(feed, asked(1), end, ended(1))
    assert feed.take() == [] and feed.asked == 1 and feed._held_bytes == 0 and not feed._open


def test_a_refused_request_is_no_record_and_holds_nothing() -> None:
    feed = TraceFeed(began_s=0.0)
    play(feed, asked(1), asked(2))
    # It waited, and another event ends its wait.
    feed.follow(Tick(), [refused(1)], 1.0)
    play(feed, ended(1), ended(2))
    assert len(feed.take()) == 1 and feed._held_bytes == 0


def test_a_cancelled_request_is_as_long_as_it_became_and_a_retry_is_none_of_its_own() -> None:
    feed = TraceFeed(began_s=0.0)
    play(feed, asked(1), ended(1, 4, "cancelled"), asked(2), ended(2, 3, "failed"), asked(3, resumed=True), ended(3))
    assert [record.output_tokens for record in feed.take()] == [4]
    assert feed.asked == 2


def test_another_sessions_plan_of_the_same_number_is_another_request() -> None:
    feed = TraceFeed(began_s=0.0)
    play(feed, asked(1), asked(1, session=2, prompt_tokens=5), ended(1, session=2), FrontLeft(session=1))
    assert [record.prompt_tokens for record in feed.take()] == [5]


def test_what_it_holds_is_bounded_and_what_does_not_fit_is_counted() -> None:
    of_one = RECORD_BYTES + len(KEYS)
    feed = TraceFeed(began_s=0.0, held_bytes_max=3 * of_one)
    play(feed, *(asked(plan_id) for plan_id in range(5)))
    assert (feed.asked, feed.dropped) == (5, 2)
    play(feed, *(ended(plan_id) for plan_id in range(5)), asked(5))
    assert feed.dropped == 3, "what waits for its client counts too"
    assert len(feed.take()) == 3
    play(feed, asked(6), ended(6))
    assert len(feed.take()) == 1 and feed.dropped == 3


def test_a_batch_is_bounded_and_said_to_be_there() -> None:
    feed = TraceFeed(began_s=0.0)
    keys = bytes(BATCH_BYTES // 4)
    play(feed, asked(1, block_keys=keys), ended(1))
    assert not feed.full.is_set()
    for plan_id in range(2, 8):
        play(feed, asked(plan_id, block_keys=keys), ended(plan_id))
    assert feed.full.is_set()
    sizes = [len(feed.take()) for _ in range(3)]
    assert sizes == [3, 3, 1] and not feed.full.is_set()
    play(feed, asked(9, block_keys=bytes(2 * BATCH_BYTES)), ended(9))
    assert len(feed.take()) == 1, "a longer one goes alone"


def test_one_that_is_closed_stays_awake() -> None:
    feed = TraceFeed(began_s=0.0)
    feed.close()
    assert feed.take() == [] and feed.full.is_set() and feed.closed
