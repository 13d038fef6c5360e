"""Requests that wait: which of them, for how long, in which order, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.priority_class import PriorityClass
from scheduler.api.actions import ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import FrontJoined, FrontLeft, PlansRunning, Tick, WorkerLeft
from scheduler.queueing.refusals import NONE_CAME
from scheduler.queueing.wait_queue import class_of
from tests.scheduler.cast import FRONT, question, ready, restarted
from tests.scheduler.queueing.queue_stage import (
    ask,
    end,
    fill,
    granted,
    refused,
    stage,
    tick,
    waiting,
)

OTHER_FRONT = FRONT + 1


def test_requests_of_a_tenant_keep_their_order_and_a_large_one_is_not_starved() -> None:
    made = stage()
    fill(made)
    ask(made, 11, prompt_tokens=60 * 32)
    ask(made, 12, prompt_tokens=32)
    assert [end(made, plan_id) for plan_id in range(1, 8)] == [[], [], [], [], [], [], [11, 12]]


def test_tenants_share_what_was_given_and_not_what_was_expected() -> None:
    made = stage()
    fill(made)
    for plan_id in range(11, 611):
        tenant = "brief" if plan_id % 2 else "long"
        ask(made, plan_id, prompt_tokens=64, output_tokens_max=256 if plan_id % 2 else 100_000, tenant=tenant)
    gives, given = {"brief": 16, "long": 256}, {"brief": 0, "long": 0}
    running = list(range(1, 11))
    for _ in range(300):
        plan_id = running.pop(0)
        tenant = "" if plan_id < 11 else "brief" if plan_id % 2 else "long"
        running += end(made, plan_id, gives.get(tenant, 32))
        if tenant:
            given[tenant] += 64 + gives[tenant]
    # What still runs was charged as expected and is corrected when it ends.
    assert given["brief"] / given["long"] == pytest.approx(1.0, abs=0.15)


def test_what_was_served_at_once_counts_when_turns_are_taken() -> None:
    made = stage()
    fill(made, tenant="greedy")
    for plan_id, tenant in ((11, "greedy"), (12, "modest")):
        ask(made, plan_id, tenant=tenant)
    assert [end(made, 1), end(made, 2)] == [[12], [11]]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, PriorityClass.DEFAULT),
        ({"priority": -1}, PriorityClass.INTERACTIVE),
        ({"priority": 7}, PriorityClass.BATCH),
        ({"priority": 7, "priority_class": "interactive"}, PriorityClass.INTERACTIVE),
        ({"priority_class": "urgent"}, PriorityClass.DEFAULT),
    ],
)
def test_a_class_is_named_or_follows_from_the_priority(fields: dict[str, Any], expected: PriorityClass) -> None:
    assert class_of(question(1, **fields)) is expected


def test_classes_share_by_weight_and_tenants_equally() -> None:
    made = stage()
    fill(made)
    asked: dict[int, str] = {}
    for plan_id in range(11, 311):
        kind = ("interactive", "default", "batch")[plan_id % 3]
        # One tenant asks nine times as much as the other.
        tenant = "modest" if plan_id % 10 == 0 else "greedy"
        asked[plan_id] = f"{kind}/{tenant}"
        ask(made, plan_id, priority_class=kind, tenant=tenant)
    order, running = [], list(range(1, 11))
    for _ in range(42):
        got = end(made, running.pop(0))
        running += got
        order += [asked[plan_id] for plan_id in got]
    classes = [name.split("/")[0] for name in order]
    counts = [classes.count(name) for name in ("interactive", "default", "batch")]
    assert counts == pytest.approx([32, 8, 2], abs=1)
    interactive = [name for name in order if name.startswith("interactive")]
    # Ten of the modest tenant's wait, and all of them are served in the first twenty.
    assert interactive[:20].count("interactive/modest") == 10


def test_a_request_that_cannot_start_in_time_is_refused_at_once_with_retry_after() -> None:
    made = stage()
    fill(made)
    for plan_id in range(11, 61):
        ask(made, plan_id, tenant="t")
        made.now_s += 0.1
        end(made, plan_id - 10)
    for plan_id in range(61, 111):
        assert isinstance(ask(made, plan_id, tenant="t")[0], ReplyWaiting)
    # Fifty wait, and ten are served a second.
    (reply,) = ask(made, 111, tenant="t", wait_max_s=2.0)
    assert refused([reply]) == [(111, "exhausted", "wait_too_long")]
    assert isinstance(reply, ReplyRefusal)
    assert reply.failure.retry_after_s == pytest.approx(5.0, rel=0.2)
    assert isinstance(ask(made, 112, tenant="t", wait_max_s=8.0)[0], ReplyWaiting)
    assert isinstance(ask(made, 113, tenant="other", wait_max_s=2.0)[0], ReplyWaiting), "none of its own is before it"


def test_when_a_class_is_full_the_tenant_with_the_most_gives_way_unless_it_would_then_have_less() -> None:
    made = stage(waiting_max=4)
    fill(made)
    for plan_id in range(11, 15):
        ask(made, plan_id, tenant="greedy")
    assert refused(ask(made, 15, tenant="greedy")) == [(15, "exhausted", "queue_full")]
    rejected, waits = ask(made, 16, tenant="modest")
    assert refused([rejected]) == [(14, "exhausted", "queue_full")] and isinstance(waits, ReplyWaiting)
    assert [reply[0] for reply in refused(ask(made, 17, tenant="modest"))] == [13]
    assert [reply[0] for reply in refused(ask(made, 18, tenant="modest"))] == [18], "each has two"


def test_prompts_wait_here_rather_than_in_a_worker_s_long_queue() -> None:
    made = stage(prefill_wait_max_s=2.0)
    made.enter("p0")
    made.now_s = 0.1
    made.report("p0", ready(prefill_tokens_queued=3000))
    assert granted(ask(made, 1)) == [1], "its speed is only assumed"
    made.now_s = 1.0
    made.report("p0", ready(prefill_tokens_queued=2500))
    assert isinstance(ask(made, 2)[0], ReplyWaiting)
    made.now_s = 2.0
    assert granted(made.report("p0", ready(prefill_tokens_queued=500))) == [2]


def test_a_request_waits_longer_for_workers_that_may_return_than_for_room() -> None:
    made = stage(silence_timeout_s=3.0, worker_lease_s=60.0)
    fill(made)
    (reply,) = ask(made, 11, priority_class="interactive")
    assert reply == ReplyWaiting(session=FRONT, plan_id=11, wait_max_s=0.5)
    made.now_s = 3.0
    assert refused(made.do(Tick())) == [(11, "exhausted", "waited_out")]
    (reply,) = ask(made, 12, priority_class="interactive")
    assert reply == ReplyWaiting(session=FRONT, plan_id=12, wait_max_s=5.0)
    ask(made, 13, priority_class="interactive", wait_max_s=2.0)
    for now_s, over in ((4.9, []), (5.0, [13]), (7.9, []), (8.0, [12])):
        made.now_s = now_s
        actions = made.do(Tick())
        assert refused(actions) == [(plan_id, "exhausted", "waited_out") for plan_id in over]
        assert all(each.failure.message == NONE_CAME for each in actions if isinstance(each, ReplyRefusal))


@pytest.mark.parametrize("first", [(), ("d0",)])
def test_after_a_start_an_interactive_request_waits_for_the_workers_that_return(first: tuple[str, ...]) -> None:
    made = restarted(waiting_max=1)
    for worker_id in first:
        made.join(worker_id)
        made.report(worker_id, ready(kv_blocks_used=100))
    ask(made, 1, priority_class="interactive")
    made.now_s = 2.5
    assert made.do(Tick()) == []
    made.join("d1")
    assert granted(made.report("d1")) == [1]


def test_a_queue_that_moved_once_and_stands_still_for_hours_still_answers() -> None:
    made = stage()
    fill(made)
    ask(made, 11)
    made.now_s = 1.0
    made.do(Tick())
    assert end(made, 1) == [11]
    asked, answers = 0, []
    for second in range(30, 3 * 3600, 30):
        made.now_s = float(second)
        made.report("d0", ready(kv_blocks_used=100))
        answers += [*ask(made, 100 + second), *made.do(Tick())]
        asked += 1
    refusals = [each for each in answers if isinstance(each, ReplyRefusal)]
    # All but the last one, which may still wait.
    assert len(refusals) >= asked - 1
    assert all(each.failure.retry_after_s for each in refusals)


def test_a_request_that_gives_up_waiting_is_not_placed() -> None:
    made = stage()
    fill(made)
    ask(made, 11)
    assert end(made, 11) == [] and waiting(made) == 0
    assert end(made, 1) == [] and made.core.plans_in_flight == 9


def test_a_question_asked_twice_is_not_answered_with_two_places() -> None:
    made = stage()
    fill(made)
    ask(made, 11)
    for plan_id in (1, 11):
        assert refused(ask(made, plan_id)) == [(plan_id, "bad_request", "plan_id_in_use")]
    assert (waiting(made), made.core.plans_in_flight) == (1, 10)
    assert end(made, 1) == [11] and end(made, 2) == []


def test_a_request_that_is_placed_at_once_gets_one_answer() -> None:
    made = stage()
    fill(made, 9, tenant="greedy")
    ask(made, 10, prompt_tokens=60 * 32, tenant="greedy")
    assert [type(action) for action in ask(made, 11, prompt_tokens=32, tenant="modest")] == [ReplyPlan]


def test_the_room_of_plans_that_are_not_run_is_given_to_waiting_requests() -> None:
    made = stage()
    fill(made)
    ask(made, 11)
    asked = frozenset(range(2, 12))
    assert granted(made.do(PlansRunning(session=FRONT, plans=(), asked=asked, complete=True))) == [11]


def test_the_room_of_a_front_proxy_that_left_is_given_to_requests_of_others() -> None:
    made = stage()
    made.do(FrontJoined(session=OTHER_FRONT, front_proxy_id="front-1"))
    fill(made)
    ask(made, 11)
    for plan_id in (21, 22):
        ask(made, plan_id, session=OTHER_FRONT)
    assert granted(made.do(FrontLeft(session=FRONT))) == [21, 22]
    assert waiting(made) == 0 and made.core.plans_in_flight == 2


def test_the_next_request_is_placed_when_the_one_before_it_timed_out() -> None:
    made = stage()
    fill(made, 9)
    ask(made, 10, prompt_tokens=60 * 32, wait_max_s=1.0)
    ask(made, 11, prompt_tokens=32)
    actions = tick(made, 1.0)
    assert (refused(actions), granted(actions)) == ([(10, "exhausted", "waited_out")], [11])


def test_requests_wait_for_a_worker_that_has_just_left_and_are_refused_once_it_is_gone_for_long() -> None:
    made = stage(silence_timeout_s=3.0)
    fill(made)
    ask(made, 11)
    made.do(WorkerLeft(session=made.session_of["d0"], worker_id="d0", reason="its stream broke"))
    assert refused(ask(made, 12)) == refused(tick(made, 2.9)) == [] and waiting(made) == 2
    assert refused(tick(made, 3.0)) == [(11, "unavailable", "no_worker"), (12, "unavailable", "no_worker")]
