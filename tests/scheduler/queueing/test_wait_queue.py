"""The queue alone: the wait that it predicts, and what its classes are charged."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.priority_class import PriorityClass
from runtime.timing.decaying_rate import DecayingRate
from scheduler.config import SchedulerParameters
from scheduler.queueing import wait_queue
from scheduler.queueing.wait_queue import Charge, WaitQueue
from tests.scheduler.cast import FRONT, question


def queue() -> WaitQueue:
    """A queue that was served at 100 tokens a second for ten seconds, and in which two tenants' batch requests wait."""
    made = WaitQueue(SchedulerParameters())
    for plan_id, tenant in ((1, "a"), (2, "b")):
        offer(made, plan_id, tenant=tenant)
    made._rate = DecayingRate(window_s=1000.0)
    made._rate.at(0.0)
    made._rate.add(1000)
    made._rate.at(10.0)
    return made


def offer(made: WaitQueue, plan_id: int, now_s: float = 10.0, *, cost: int = 100, **changes: Any) -> None:
    made.offer(question(plan_id, **{"priority_class": "batch", **changes}), cost, now_s)


def predicted_s(made: WaitQueue, its_class: PriorityClass, tenant: str) -> float:
    wait_s = made.predicted_wait_s(its_class, tenant)
    assert wait_s is not None
    return wait_s


@pytest.mark.parametrize("missing", [False, True])
def test_only_for_missing_workers_may_a_request_wait_longer_than_for_room(missing: bool) -> None:
    made = queue()
    offer(made, 3, cost=150, priority_class="interactive")
    assert predicted_s(made, PriorityClass.INTERACTIVE, "") == pytest.approx(1.6, rel=0.1)
    place, _ = made.offer(question(4, priority_class="interactive"), 10, 10.0, missing_wait_s=5.0 * missing)
    assert (place is not None) is missing


def test_a_predicted_wait_is_at_most_that_of_the_whole_queue() -> None:
    made = queue()
    for plan_id in range(3, 9):
        offer(made, plan_id, tenant="a")
    assert predicted_s(made, PriorityClass.BATCH, "a") == pytest.approx(8.0, rel=0.02)
    assert predicted_s(made, PriorityClass.BATCH, "new") == 0.0


def test_time_without_waiting_requests_does_not_slow_the_pace_and_time_in_which_nothing_moves_does() -> None:
    made = queue()
    for plan_id in (1, 2):
        made.remove((FRONT, plan_id), 10.0)
    offer(made, 3, 500.0)
    before_s = predicted_s(made, PriorityClass.BATCH, "")
    assert before_s == pytest.approx(1.0, rel=0.02)
    made.overdue(520.0)
    assert predicted_s(made, PriorityClass.BATCH, "") > 2 * before_s


def test_a_class_gets_back_what_it_was_charged_and_did_not_use() -> None:
    made = WaitQueue(SchedulerParameters())
    for plan_id, its_class in ((1, "batch"), (2, "default"), (3, "batch"), (4, "default"), (5, "batch")):
        offer(made, plan_id, 0.0, priority_class=its_class)
    order = []
    for _ in range(3):
        head = made.head()
        assert head is not None
        made.take(head, 0.0)
        order.append(head.event.plan_id)
        if head.priority_class is PriorityClass.BATCH:
            made.correct(Charge(priority_class=PriorityClass.BATCH, tenant="", output_tokens=100), 0)
    assert order == [1, 3, 5], "it used nothing, so its next turn comes before a class that has more weight"


def test_resumed_requests_have_a_bound_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_queue, "RESUMED_WAITING_MAX", 1)
    made = WaitQueue(SchedulerParameters(waiting_max=1))
    offer(made, 1, 0.0)
    placed = [made.offer(question(plan_id, resumed=True), 100, 0.0)[0] is not None for plan_id in (2, 3)]
    assert placed == [True, False]
