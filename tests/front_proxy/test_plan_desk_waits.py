"""Who finds no room without the scheduler waits for it here, as he would there, one sentence each."""

from __future__ import annotations

from typing import Any

import pytest

from front_proxy.desk_events import (
    AnswerPlan,
    AnswerRefusal,
    Ended,
    OutageOver,
    Refused,
    SendEnd,
    SendQuestion,
    ToldToWait,
    ViewShown,
)
from runtime.failures import FailureKind
from scheduler.config import SchedulerConfig
from scheduler.events import PlanRequested
from scheduler.placement import Planner
from tests.front_proxy.desk_play import BIG, BUSY, FULL, USABLE, Play, granted, only


def test_who_waits_here_while_the_scheduler_is_silent_is_ended_there_when_it_gets_a_place_here() -> None:
    it = Play()
    it.open(BUSY)
    plan_id, _ = it.ask(BIG)
    assert only(it.wait(1.0), AnswerPlan) == []
    end, answer = it.wait(10.0)
    assert end == SendEnd(plan_id, "failed", 0)
    assert isinstance(answer, AnswerPlan) and answer.here
    refused = Play()
    refused.open(BUSY)
    plan_id, _ = refused.ask(BIG)
    refused.wait(1.0)
    assert FULL in [answer.failure for answer in only(refused.hear(Refused(plan_id, FULL)), AnswerRefusal)]
    assert refused.desk.unanswered == 0


def test_a_scheduler_that_falls_silent_has_nobody_wait_for_his_turn() -> None:
    it = Play()
    it.open(BUSY)
    turn, _ = it.ask(BIG)
    it.hear(ToldToWait(turn, 120.0), USABLE)
    plan_id, _ = it.ask()
    answers = only(it.wait(0.5), AnswerPlan)
    assert {answer.plan.plan_id for answer in answers} == {turn, plan_id} and it.desk.unanswered == 0


def test_the_waiting_line_of_a_scheduler_that_dies_waits_on_for_room_here() -> None:
    it = Play()
    it.open(BUSY)
    line = [it.ask(BIG)[0] for _ in range(3)]
    for plan_id in line:
        it.hear(ToldToWait(plan_id, 15.0))
    it.wait(1.0)
    assert only(it.lose(), AnswerRefusal) == []
    fresh, _ = it.ask(BIG)
    assert only(it.wait(1.0), AnswerRefusal) == [] and it.desk.unanswered == 4
    assert it.lose("refused")[:-1] == [], "a dial that fails changes nothing of it"
    first = only(it.wait(9.0), AnswerPlan)
    assert [answer.plan.plan_id for answer in first] == line[:1], "what was seen there is believed to end"
    (second,) = only(it.do(Ended(line[0], "finished", 1)), AnswerPlan)
    assert second.plan.plan_id == line[1] and second.here, "in their order, whoever ends"
    over = only(it.wait(4.5), AnswerRefusal)
    assert [refusal.plan_id for refusal in over] == line[2:], "as long as it was told, and not longer"
    assert over[0].failure.kind is FailureKind.EXHAUSTED and over[0].here
    over = only(it.wait(7.0), AnswerRefusal)
    assert [refusal.plan_id for refusal in over] == [fresh], "as long as the scheduler would have it wait"


def test_who_waits_here_is_asked_anew_when_the_scheduler_is_back_and_knows_everybody() -> None:
    it = Play()
    it.open(BUSY)
    plan_id, _ = it.ask(BIG)
    it.lose()
    assert only(it.open(ViewShown([], rebuilding=True)), SendQuestion) == []
    assert it.wait(1.0) == [] and it.desk.unanswered == 1, "it waits here on"
    *_, over = it.hear(BUSY)
    assert over == OutageOver(0)
    (asked,) = only(it.wait(0.0), SendQuestion)
    assert asked.plan_id == plan_id
    assert 0.0 < asked.question.wait_max_s <= SchedulerConfig().waiting.default.wait_max_s - 1.0, "what is left of it"
    assert only(it.hear(ToldToWait(plan_id, 3.0), granted(plan_id)), AnswerPlan)


def test_who_is_told_to_wait_by_one_scheduler_after_the_other_waits_no_longer_than_the_first_one_said() -> None:
    it = Play()
    it.open(BUSY)
    plan_id, _ = it.ask(BIG)
    it.hear(ToldToWait(plan_id, 3.0))
    asked = []
    for _ in range(3):
        it.wait(0.9)
        it.lose()
        asked += only(it.open(BUSY), SendQuestion)
        asked += only(it.wait(0.0), SendQuestion)
    assert [round(one.question.wait_max_s, 1) for one in asked] == [2.1, 1.2, 0.3]


def test_who_waits_here_gets_no_place_from_a_view_that_is_too_old() -> None:
    it = Play(view_max_age_s=1.0)
    it.open(BUSY)
    runs, _ = it.ask(BIG)
    it.hear(granted(runs))
    plan_id, _ = it.ask(BIG)
    it.lose()
    it.wait(1.1)
    assert it.do(Ended(runs, "finished", 1)) == []
    (refusal,) = only(it.wait(20.0), AnswerRefusal)
    assert refusal.plan_id == plan_id and refusal.failure.kind is FailureKind.UNAVAILABLE
    assert it.do(Ended(plan_id, "failed", 0)) == []


def test_a_thousand_who_wait_here_cost_one_look_at_the_first_of_them_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    it = Play()
    it.open(BUSY)
    runs, _ = it.ask(BIG)
    it.hear(granted(runs))
    for _ in range(1000):
        it.ask_unchecked(BIG)
    it.lose()
    placed: list[int] = []
    place = Planner.place

    def counted(planner: Planner, event: PlanRequested, *rest: Any) -> Any:
        placed.append(event.plan_id)
        return place(planner, event, *rest)

    monkeypatch.setattr(Planner, "place", counted)
    it.do_unchecked(Ended(runs, "finished", 1))
    assert len(placed) <= 3 and it.desk.unanswered >= 999


def test_a_scheduler_that_is_asked_late_has_its_time_to_answer_all_the_same() -> None:
    it = Play()
    it.open(ViewShown([]))
    it.lose()
    it.ask()
    it.wait(0.5)
    it.now_s += 4.4
    it.open(USABLE)
    it.wait(0.0)
    it.wait(0.4)
    assert (it.desk.connected, it.desk.unanswered) == (True, 1)
    it.wait(0.1)
    assert (it.desk.connected, it.desk.unanswered) == (False, 0)
