"""Requests that find no room without the scheduler: new ones are refused, those under way are tried again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from front_proxy.planning.events import (
    AnswerPlan,
    AnswerRefusal,
    OutageOver,
    PlanClientAction,
    PlanEnded,
    SendQuestion,
    ViewShown,
)
from runtime.failures import FailureKind
from tests.front_proxy.plan_client_play import (
    BIG,
    BUSY,
    CONFIG,
    FULL,
    QUESTION,
    USABLE,
    Play,
    entry,
    granted,
    only,
    queue_reply,
    rejected,
)

# Of a worker that failed it; BIG of the two fits nowhere while d0 is as full as it was seen.
RESUMED = msgspec.structs.replace(QUESTION, excluded_worker_ids=frozenset({"d1"}), resumed=True)
RESUMED_BIG = msgspec.structs.replace(RESUMED, prompt_tokens=BIG.prompt_tokens)


def answers(actions: Sequence[PlanClientAction]) -> list[PlanClientAction]:
    return [action for action in actions if isinstance(action, AnswerPlan | AnswerRefusal)]


@pytest.mark.parametrize("queued", [True, False])
def test_a_resumed_request_is_tried_every_patience_until_there_is_room(queued: bool) -> None:
    it = Play()
    it.open(BUSY)
    plan_id, _ = it.ask(RESUMED_BIG)
    if queued:
        it.hear(queue_reply(plan_id, 30.0))
    assert answers(it.lose()) == [], "all that one fault breaks is broken a moment later"
    assert answers(it.wait(4.0)) == [] and it.plan_client.unanswered == 1
    if queued:
        (answer,) = only(it.wait(5.5), AnswerPlan)
        assert answer.plan.plan_id == plan_id and answer.local, "what was seen there is believed to end"
    else:
        (refusal,) = only(it.wait(1.0), AnswerRefusal)
        assert refusal.plan_id == plan_id and it.now_s == 1005.0, "plan_timeout_s is over"
        assert refusal.failure.kind is FailureKind.EXHAUSTED


def test_a_resumed_request_that_comes_in_an_outage_is_planned_after_a_patience_and_a_new_one_at_once() -> None:
    it = Play()
    it.open(USABLE)
    it.lose()
    new, _ = it.ask()
    resumed, _ = it.ask(RESUMED)
    assert [answer.plan.plan_id for answer in only(it.wait(0.4), AnswerPlan)] == [new]
    assert [answer.plan.plan_id for answer in only(it.wait(0.1), AnswerPlan)] == [resumed]


def test_a_resumed_request_avoids_the_workers_that_failed_it_once() -> None:
    it = Play()
    it.open(ViewShown([entry("d1")]))
    it.lose()
    it.ask(RESUMED)
    assert only(it.wait(0.9), AnswerPlan) == []
    (answer,) = only(it.wait(0.1), AnswerPlan)
    assert answer.plan.decode is not None and answer.plan.decode.worker_id == "d1"


def test_a_resumed_request_that_can_never_fit_is_refused_at_once() -> None:
    it = Play()
    it.open(USABLE)
    it.lose()
    it.ask(msgspec.structs.replace(RESUMED, prompt_tokens=10_000 * 32))
    (refusal,) = only(it.wait(0.5), AnswerRefusal)
    assert refusal.failure.kind is FailureKind.BAD_REQUEST


def test_a_resumed_request_is_asked_of_the_scheduler_when_that_is_back_and_knows_all_workers() -> None:
    it = Play()
    it.open(BUSY)
    plan_id, _ = it.ask(RESUMED_BIG)
    it.lose()
    it.wait(1.0)
    assert only(it.open(ViewShown([], recovering=True)), SendQuestion) == []
    assert it.wait(1.0) == [] and it.plan_client.unanswered == 1, "it is tried here on"
    *_, over = it.hear(BUSY)
    assert over == OutageOver(0)
    (asked,) = only(it.wait(0.5), SendQuestion)
    assert asked.plan_id == plan_id and asked.question.resumed and asked.question.excluded_worker_ids == frozenset()
    assert only(it.hear(queue_reply(plan_id, 3.0), granted(plan_id)), AnswerPlan)


def test_a_silent_scheduler_that_speaks_again_may_still_answer_a_resumed_request() -> None:
    it = Play()
    it.open(BUSY)
    plan_id, _ = it.ask(RESUMED_BIG)
    assert answers(it.wait(1.0)) == [] and not it.plan_client.connected
    assert only(it.hear(None), SendQuestion) == [], "it has the question"
    assert it.wait(0.4) == [], "it has its time to answer again"
    assert FULL in [answer.failure for answer in only(it.hear(rejected(plan_id)), AnswerRefusal)]


def test_nothing_is_placed_from_a_view_that_is_too_old() -> None:
    it = Play(view_max_age_s=1.0)
    it.open(BUSY)
    runs, _ = it.ask(BIG)
    it.hear(granted(runs))
    it.lose()
    plan_id, _ = it.ask(RESUMED_BIG)
    it.wait(1.1)
    assert it.do(PlanEnded(runs, "finished", 1)) == []
    (refusal,) = only(it.wait(5.0), AnswerRefusal)
    assert refusal.plan_id == plan_id and refusal.failure.kind is FailureKind.UNAVAILABLE


def test_a_scheduler_that_is_asked_late_has_its_time_to_answer_all_the_same() -> None:
    it = Play()
    it.open(ViewShown([]))
    it.lose()
    it.ask()
    it.wait(0.5)
    it.now_s += CONFIG.plan_timeout_s - 0.6
    it.open(USABLE)
    it.wait(0.0)
    it.wait(0.4)
    assert (it.plan_client.connected, it.plan_client.unanswered) == (True, 1)
    it.wait(0.1)
    assert (it.plan_client.connected, it.plan_client.unanswered) == (False, 0)


def test_a_scheduler_that_is_back_when_a_wait_is_over_is_asked() -> None:
    it = Play()
    it.open(BUSY)
    it.lose()
    plan_id, _ = it.ask(RESUMED_BIG)
    it.wait(CONFIG.plan_timeout_s - 0.1)
    it.now_s += 0.1
    it.open(BUSY)
    assert [asked.plan_id for asked in only(it.wait(0.0), SendQuestion)] == [plan_id]
