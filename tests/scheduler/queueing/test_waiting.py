"""What many requests that wait get. The scripts ``tests/golden/scheduler_*.txt`` show the course of single ones."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.failures import FailureKind
from runtime.priority_class import PriorityClass
from scheduler.api.actions import Action, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import RequestEnded, Tick, WorkerLeft
from scheduler.config import ScalingConfig
from scheduler.queueing.wait_queue import class_of
from tests.scheduler.cast import FRONT, Stage, question, ready


def full_stage() -> Stage:
    """One decode worker, which holds ten requests and has them: plans 1 to 10."""
    made = Stage()
    made.enter("d0")
    for plan_id in range(1, 11):
        assert isinstance(ask(made, plan_id), ReplyPlan)
    return made


def ask(made: Stage, plan_id: int, **changes: Any) -> Action:
    """The answer to a question."""
    return made.do(question(plan_id, **changes))[0]


def end(made: Stage, plan_id: int, output_tokens: int = 32) -> list[int]:
    """End a plan; the ids of those that got its place."""
    actions = made.do(RequestEnded(session=FRONT, plan_id=plan_id, output_tokens=output_tokens))
    return [action.plan_id for action in actions if isinstance(action, ReplyPlan)]


def test_tenants_share_what_was_given_and_not_what_was_expected() -> None:
    made = full_stage()
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
    made = full_stage()
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
    made = full_stage()
    for plan_id in range(11, 61):
        ask(made, plan_id, tenant="t")
        made.now_s += 0.1
        end(made, plan_id - 10)
    for plan_id in range(61, 111):
        assert isinstance(ask(made, plan_id, tenant="t"), ReplyWaiting)
    # Fifty wait, and ten are served a second.
    reply = ask(made, 111, tenant="t", wait_max_s=2.0)
    assert isinstance(reply, ReplyRefusal) and reply.cause == "wait_too_long"
    assert reply.failure.retry_after_s == pytest.approx(5.0, rel=0.2)
    assert isinstance(ask(made, 112, tenant="t", wait_max_s=8.0), ReplyWaiting)
    assert isinstance(ask(made, 113, tenant="other", wait_max_s=2.0), ReplyWaiting), "none of its own is before it"


def test_a_queue_that_moved_once_and_stands_still_for_hours_still_answers() -> None:
    made = full_stage()
    ask(made, 11)
    made.now_s = 1.0
    made.do(Tick())
    assert end(made, 1) == [11]
    asked, answers = 0, list[Action]()
    for second in range(30, 3 * 3600, 30):
        made.now_s = float(second)
        made.report("d0", ready(kv_blocks_used=100))
        answers += [ask(made, 100 + second), *made.do(Tick())]
        asked += 1
    refusals = [each for each in answers if isinstance(each, ReplyRefusal)]
    # All but the last one, which may still wait.
    assert len(refusals) >= asked - 1
    assert all(each.failure.retry_after_s for each in refusals)


def asleep() -> Stage:
    """All workers were ended at idle; the last start took 90 s."""
    made = Stage(scaling=ScalingConfig(actuator="launcher", idle_s=600.0, wake_timeout_s=60.0))
    made.join("d0", start_s=90.0)
    made.do(WorkerLeft(session=made.core.cluster.workers["d0"].session, worker_id="d0", reason="stopped"))
    made.now_s = 1_000.0
    return made


def test_while_no_worker_is_there_requests_wait_for_one_and_a_time_to_the_first_token_bounds_that() -> None:
    made = asleep()
    waits = [ask(made, 1), ask(made, 2, priority_class="interactive"), ask(made, 3, ttft_slo_s=2.0)]
    assert [each.wait_max_s for each in waits if isinstance(each, ReplyWaiting)] == [60.0, 60.0, 2.0]
    # One that needs no decode worker waits behind them.
    made.enter("p0")
    behind = ask(made, 4, output_tokens_max=1, prefill_only=True)
    assert isinstance(behind, ReplyWaiting)
    assert behind.wait_max_s == 60.0
    # However long nothing moves, that says nothing about the pace.
    made.now_s += 50.0
    assert isinstance(ask(made, 5), ReplyWaiting)
    made.join("d0", epoch=2)
    assert sorted(each.plan_id for each in made.report("d0") if isinstance(each, ReplyPlan)) == [1, 2, 3, 4, 5]


def test_a_wake_that_takes_too_long_refuses_with_what_is_left_of_a_start() -> None:
    made = asleep()
    ask(made, 1)
    made.now_s += 60.0
    [refused] = [action for action in made.do(Tick()) if isinstance(action, ReplyRefusal)]
    assert (refused.cause, refused.failure.kind) == ("no_worker", FailureKind.UNAVAILABLE)
    assert refused.failure.retry_after_s == 30.0
    assert "about 90 s" in refused.failure.message


def test_without_an_actuator_that_starts_workers_none_is_waited_for() -> None:
    made = Stage(scaling=ScalingConfig(idle_s=600.0))
    refused = ask(made, 1)
    assert isinstance(refused, ReplyRefusal)
    assert refused.cause == "no_worker"
