"""What no message can say is said as nearly as one can."""

from __future__ import annotations

from runtime.failures import Failure, FailureKind
from scheduler import wire
from scheduler.api.actions import ReplyRefusal


def test_advice_that_no_message_can_say_is_the_longest_that_one_can() -> None:
    failure = Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=1e9)
    told = wire.refusal(ReplyRefusal(session=1, plan_id=1, failure=failure, cause="queue_full"))
    assert told.refused.retry_after_ms == 2**32 - 1
