"""Whose turn it is where some wait and others come, leave or are over: everybody gets one answer, and in his turn."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.failures import FailureKind
from runtime.priority_class import PriorityClass
from runtime.timing.decaying_rate import DecayingRate
from scheduler.api.actions import Action, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import (
    FrontJoined,
    FrontLeft,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    Tick,
    WorkerLeft,
)
from scheduler.config import PriorityClassConfig, WaitingConfig
from scheduler.queueing.wait_queue import Charge, WaitQueue
from tests.scheduler.cast import FRONT, Stage

OTHER_FRONT = FRONT + 1


def stage(**config: Any) -> Stage:
    """One decode worker, which holds ten of the requests below; two front proxies."""
    made = Stage(**{"waiting": WaitingConfig(), **config})
    made.enter("d0")
    made.do(FrontJoined(session=OTHER_FRONT, front_proxy_id="front-1"))
    return made


def question(plan_id: int, **changes: Any) -> PlanRequested:
    fields = {"session": FRONT, "request_id": f"r{plan_id}", "prompt_tokens": 288, "output_tokens_max": 32, **changes}
    return PlanRequested(plan_id=plan_id, **fields)


def fill(made: Stage, count: int = 10, **changes: Any) -> None:
    for plan_id in range(1, count + 1):
        assert granted(made.do(question(plan_id, **changes))) == [plan_id]


def granted(actions: list[Action]) -> list[int]:
    return [action.plan_id for action in actions if isinstance(action, ReplyPlan)]


def refused(actions: list[Action]) -> list[int]:
    return [action.plan_id for action in actions if isinstance(action, ReplyRefusal)]


def waiting(made: Stage) -> int:
    return sum(made.core.waiting().values())


def end(made: Stage, plan_id: int, output_tokens: int = 32, session: int = FRONT) -> list[int]:
    return granted(made.do(RequestEnded(session=session, plan_id=plan_id, output_tokens=output_tokens)))


def test_a_request_that_gives_up_waiting_is_not_placed() -> None:
    made = stage()
    fill(made)
    made.do(question(11))
    assert end(made, 11) == [] and waiting(made) == 0
    assert end(made, 1) == [] and made.core.plans_in_flight == 9


def test_a_question_asked_twice_is_not_answered_with_two_places() -> None:
    made = stage()
    fill(made)
    made.do(question(11))
    (reply,) = made.do(question(11))
    assert isinstance(reply, ReplyRefusal) and reply.failure.kind is FailureKind.BAD_REQUEST
    assert waiting(made) == 1
    assert end(made, 1) == [11] and end(made, 2) == []


def test_a_small_request_does_not_overtake_one_that_waits_for_room() -> None:
    made = stage()
    fill(made, 9)
    assert granted(made.do(question(10, prompt_tokens=60 * 32))) == []
    assert [type(action) for action in made.do(question(11, prompt_tokens=32))] == [ReplyWaiting]


def test_a_request_that_is_placed_at_once_gets_one_answer() -> None:
    made = stage()
    fill(made, 9, tenant="greedy")
    made.do(question(10, prompt_tokens=60 * 32, tenant="greedy"))
    assert [type(action) for action in made.do(question(11, prompt_tokens=32, tenant="modest"))] == [ReplyPlan]


def test_what_was_served_at_once_counts_when_turns_are_taken() -> None:
    made = stage()
    fill(made, tenant="greedy")
    for plan_id, tenant in ((11, "greedy"), (12, "modest")):
        made.do(question(plan_id, tenant=tenant))
    assert [end(made, 1), end(made, 2)] == [[12], [11]]


def test_a_long_answer_is_not_charged_before_it_came() -> None:
    made = stage(output_reserve_tokens=32)
    fill(made)
    for plan_id in range(11, 31):
        tenant = "long" if plan_id % 2 else "short"
        made.do(question(plan_id, tenant=tenant, output_tokens_max=100_000 if tenant == "long" else 32))
    got = [end(made, plan_id)[0] for plan_id in range(1, 11)]
    assert sum(plan_id % 2 for plan_id in got) == 5


def test_the_room_of_plans_that_are_not_run_is_given_to_waiting_requests() -> None:
    made = stage()
    fill(made)
    made.do(question(11))
    asked = frozenset(range(2, 12))
    assert granted(made.do(PlansRunning(session=FRONT, plans=(), asked=asked, complete=True))) == [11]


def test_the_room_of_a_front_proxy_that_left_is_given_to_requests_of_others() -> None:
    made = stage()
    fill(made)
    made.do(question(11))
    for plan_id in (21, 22):
        made.do(question(plan_id, session=OTHER_FRONT))
    assert granted(made.do(FrontLeft(session=FRONT))) == [21, 22]
    assert waiting(made) == 0 and made.core.plans_in_flight == 2


def test_the_next_request_is_placed_when_the_one_before_it_timed_out() -> None:
    made = stage()
    fill(made, 9)
    made.do(question(10, prompt_tokens=60 * 32, wait_max_s=1.0))
    made.do(question(11, prompt_tokens=32))
    made.now_s = 1.0
    made.report("d0")
    actions = made.do(Tick())
    assert (refused(actions), granted(actions)) == ([10], [11])


def test_a_request_that_waits_for_a_worker_that_is_gone_is_refused() -> None:
    made = stage()
    fill(made)
    made.do(question(11))
    made.do(WorkerLeft(session=made.session_of["d0"], worker_id="d0", reason="gone"))
    assert refused(made.do(Tick())) == [11] and waiting(made) == 0


def test_a_tenant_takes_no_place_of_one_that_would_then_have_less() -> None:
    made = stage(waiting=WaitingConfig(default=PriorityClassConfig(waiting_max=3)))
    fill(made)
    for plan_id in (11, 12, 13):
        made.do(question(plan_id, tenant="greedy"))
    assert refused(made.do(question(14, tenant="modest"))) == [13]
    assert refused(made.do(question(15, tenant="modest"))) == [15]


# The line alone.

QUICK = PriorityClassConfig(weight=16.0, wait_max_s=0.5)


def line(tokens_per_s: int | None = 100, **settings: Any) -> WaitQueue:
    """A line that was served at this pace for ten seconds, and in which two tenants' batch requests wait."""
    made = WaitQueue(WaitingConfig(**{"interactive": QUICK, **settings}))
    for plan_id, tenant in ((1, "a"), (2, "b")):
        made.offer(question(plan_id, tenant=tenant, priority_class="batch"), 100, 0.0)
    if tokens_per_s is not None:
        made._rate = DecayingRate(window_s=1000.0)
        made._rate.at(0.0)
        made._rate.add(tokens_per_s * 10)
        made._rate.at(10.0)
    return made


def predicted_s(made: WaitQueue, its_class: PriorityClass, tenant: str) -> float:
    wait_s = made.predicted_wait_s(its_class, tenant)
    assert wait_s is not None
    return wait_s


@pytest.mark.parametrize(("missing", "waits"), [(False, False), (True, True)])
def test_only_for_missing_workers_may_a_request_wait_longer_than_for_room(missing: bool, waits: bool) -> None:
    made = line()
    made.offer(question(3, priority_class="interactive"), 150, 10.0)
    assert predicted_s(made, PriorityClass.INTERACTIVE, "") == pytest.approx(1.6, rel=0.1)
    place, _ = made.offer(question(4, priority_class="interactive"), 10, 10.0, missing=missing)
    assert (place is not None) is waits


def test_a_predicted_wait_is_at_most_that_of_the_whole_queue() -> None:
    made = line()
    for plan_id in range(3, 9):
        made.offer(question(plan_id, tenant="a", priority_class="batch"), 100, 10.0)
    assert predicted_s(made, PriorityClass.BATCH, "a") == pytest.approx(8.0, rel=0.02)
    assert predicted_s(made, PriorityClass.BATCH, "new") == 0.0


def test_time_without_waiting_requests_does_not_slow_the_pace() -> None:
    made = line()
    for plan_id in (1, 2):
        made.remove((FRONT, plan_id), 10.0)
    made.offer(question(3, priority_class="batch"), 100, 500.0)
    assert predicted_s(made, PriorityClass.BATCH, "") == pytest.approx(1.0, rel=0.02)


def test_time_in_which_nothing_moves_slows_the_pace() -> None:
    made = line()
    before_s = predicted_s(made, PriorityClass.BATCH, "a")
    made.overdue(30.0)
    assert predicted_s(made, PriorityClass.BATCH, "a") > 2 * before_s


def test_a_class_gets_back_what_it_was_charged_and_did_not_use() -> None:
    made = WaitQueue(WaitingConfig())
    for plan_id, its_class in ((1, "batch"), (2, "default"), (3, "batch"), (4, "default"), (5, "batch")):
        made.offer(question(plan_id, priority_class=its_class), 100, 0.0)
    order = []
    for _ in range(3):
        head = made.head()
        assert head is not None
        made.take(head, 0.0)
        order.append(head.event.plan_id)
        if head.priority_class is PriorityClass.BATCH:
            made.correct(Charge(priority_class=PriorityClass.BATCH, tenant="", output_tokens=100), 0)
    assert order == [1, 3, 5], "it used nothing, so its next turn comes before a class that has more weight"
