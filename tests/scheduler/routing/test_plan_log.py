"""The memory of plans: what it keeps, what it forgets, and by which names a request is found."""

from __future__ import annotations

import random

import pytest

from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement, ReplyPlan, ReplyRefusal
from scheduler.api.events import PlanRequested, RequestEnded
from scheduler.api.explanation import PlanExplained
from scheduler.routing.plan_log import PlanLog

D0 = Placement(worker_id="d0", address="d0:1", epoch=1)


def asked(plan_id: int, request_id: str, session: int = 1) -> PlanRequested:
    return PlanRequested(session=session, plan_id=plan_id, request_id=request_id, prompt_tokens=64, output_tokens_max=8)


def explained(event: PlanRequested) -> PlanExplained:
    return PlanExplained(request_id=event.request_id, prompt_tokens=event.prompt_tokens)


def plan(event: PlanRequested) -> ReplyPlan:
    return ReplyPlan(
        session=event.session,
        plan_id=event.plan_id,
        prefill=None,
        decode=D0,
        decode_blocks_reserved=3,
        reason="remote",
        explained=explained(event),
    )


def refusal(event: PlanRequested) -> ReplyRefusal:
    failure = Failure(kind=FailureKind.EXHAUSTED, message="Full.")
    return ReplyRefusal(
        session=event.session, plan_id=event.plan_id, failure=failure, cause="queue_full", explained=explained(event)
    )


def found(log: PlanLog, request_id: str) -> list[int]:
    return [logged.answer.plan_id for logged in log.find(request_id)]


def test_the_plans_of_a_request_come_in_order_each_with_its_own_end() -> None:
    log = PlanLog()
    log.remember(plan(asked(1, "r")), 1.0)
    log.remember(plan(asked(2, "other")), 2.0)
    log.remember(refusal(asked(3, "r")), 3.0)
    failed = RequestEnded(session=1, plan_id=1, outcome="failed", finish="unavailable")
    log.end(failed)
    log.end(RequestEnded(session=1, plan_id=1, outcome="finished"))
    log.end(RequestEnded(session=2, plan_id=2, outcome="finished"))
    log.end(RequestEnded(session=1, plan_id=99, outcome="finished"))
    first, second = log.find("r")
    assert (first.answered_s, first.ended, second.answered_s, second.ended) == (1.0, failed, 3.0, None)
    assert isinstance(first.answer, ReplyPlan) and isinstance(second.answer, ReplyRefusal)
    assert [logged.ended for logged in log.find("other")] == [None], "another session's plan of this number ended"


def test_the_oldest_is_forgotten_first_whatever_ended_meanwhile() -> None:
    log, rng = PlanLog(plans_max=50), random.Random(3)
    for plan_id in range(400):
        log.remember((plan if rng.random() < 0.7 else refusal)(asked(plan_id, f"r{plan_id}")), float(plan_id))
        log.end(RequestEnded(session=1, plan_id=rng.randrange(plan_id + 1), outcome="finished"))
        known = [number for number in range(plan_id + 1) if found(log, f"r{number}")]
        assert known == list(range(max(0, plan_id - 49), plan_id + 1))


def test_an_answer_without_an_explanation_is_not_kept() -> None:
    log = PlanLog()
    log.remember(ReplyPlan(session=1, plan_id=1, prefill=None, decode=D0, decode_blocks_reserved=1, reason="x"), 0.0)
    assert log.find("") == []


@pytest.mark.parametrize(
    ("name", "asked_as"),
    [
        ("my.id", "chatcmpl-my.id-0a1b2c3d"),
        ("my.id", "cmpl-my.id-0-0a1b2c3d"),
        ("my.id", "3_chatcmpl-my.id-0a1b2c3d"),
        ("my.id", "my.id-0a1b2c3d"),
        ("my.id", "my.id"),
        ("chatcmpl-my.id", "chatcmpl-my.id-0a1b2c3d"),
        ("cmpl-my.id", "cmpl-my.id-1-0a1b2c3d"),
        ("resp_my", "resp_my_0-0a1b2c3d"),
        ("chatcmpl-my.id-0a1b2c3d", "chatcmpl-my.id-0a1b2c3d"),
    ],
)
def test_a_request_is_found_by_each_of_its_names(name: str, asked_as: str) -> None:
    log = PlanLog()
    log.remember(plan(asked(1, asked_as)), 0.0)
    assert found(log, name) == [1]


@pytest.mark.parametrize(
    ("name", "asked_as"),
    [
        ("my", "chatcmpl-my.id-0a1b2c3d"),
        ("my.id", "chatcmpl-my_id-0a1b2c3d"),
        ("id", "my.id-0a1b2c3d"),
        ("my", "chatcmpl-my-1-0a1b2c3d"),
        ("my", "my_0-0a1b2c3d"),
        ("", "chatcmpl-my.id-0a1b2c3d"),
        ("my.id", "chatcmpl-my.id-0A1B2C3D"),
    ],
)
def test_a_part_of_a_name_finds_nothing(name: str, asked_as: str) -> None:
    log = PlanLog()
    log.remember(plan(asked(1, asked_as)), 0.0)
    assert found(log, name) == []
