"""What a front proxy asks over the wire is what its own scheduler core would hear."""

from __future__ import annotations

import pytest

from front_proxy.dispatch import wire as front_wire
from front_proxy.planning.events import PlanQuestion, requested
from front_proxy.request.events import AskPlan
from runtime.failures import Failure, FailureKind
from scheduler import wire
from scheduler.api.actions import ReplyRefusal


@pytest.mark.parametrize(
    "ask",
    [
        AskPlan(attempt=1),
        AskPlan(attempt=3, resume_tokens=2, excluded_worker_ids=("a", "b"), prefill_only=True),
        AskPlan(attempt=1, pinned_decode_worker="d"),
    ],
)
def test_a_question_arrives_whole(ask: AskPlan) -> None:
    question = PlanQuestion(
        ask=ask, request_id="r", prompt_tokens=30, output_tokens_max=9, priority=-2, priority_class="batch",
        tenant="t", wait_max_s=1.5,
    )  # fmt: skip
    sent = front_wire.plan_request(7, question)
    assert wire.plan_requested(5, sent.plan) == requested(5, 7, question)


def test_advice_that_no_message_can_say_is_the_longest_that_one_can() -> None:
    failure = Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=1e9)
    told = wire.refusal(ReplyRefusal(session=1, plan_id=1, failure=failure, cause="queue_full"))
    assert told.refused.retry_after_ms == 2**32 - 1
