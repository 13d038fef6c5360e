"""Requests that wait: who, for how long, in which order, and what they are told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from runtime.failures import FailureKind
from runtime.priority_class import PriorityClass
from scheduler.api.actions import Action, PublishView, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import FrontJoined, PlanRequested, RequestEnded, Tick
from scheduler.config import PriorityClassConfig, WaitingConfig
from scheduler.core import SchedulerCore
from scheduler.queueing.wait_queue import class_of
from tests.scheduler.cast import FRONT, Stage, ready


def stage(**config: Any) -> Stage:
    """One decode worker, which holds ten of the requests below."""
    made = Stage(**{"waiting": WaitingConfig(), **config})
    made.enter("d0")
    return made


def ask(made: Stage, plan_id: int, **changes: Any) -> list[Action]:
    fields: dict[str, Any] = {"request_id": f"r{plan_id}", "prompt_tokens": 288, "output_tokens_max": 32, **changes}
    return made.do(PlanRequested(session=FRONT, plan_id=plan_id, **fields))


def end(made: Stage, plan_id: int, output_tokens: int = 32) -> list[int]:
    """End a plan; the ids of those that got its place."""
    return granted(made.do(RequestEnded(session=FRONT, plan_id=plan_id, output_tokens=output_tokens)))


def granted(actions: list[Action]) -> list[int]:
    return [action.plan_id for action in actions if isinstance(action, ReplyPlan)]


def refused(actions: list[Action]) -> list[ReplyRefusal]:
    return [action for action in actions if isinstance(action, ReplyRefusal)]


def fill(made: Stage, count: int = 10) -> None:
    for plan_id in range(1, count + 1):
        assert granted(ask(made, plan_id)) == [plan_id]


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
        ask(made, plan_id, prompt_tokens=64, output_tokens_max=256, tenant=tenant)
    gives, given = {"brief": 16, "long": 256}, {"brief": 0, "long": 0}
    running = list(range(1, 11))
    for _ in range(300):
        plan_id = running.pop(0)
        tenant = "nobody" if plan_id < 11 else "brief" if plan_id % 2 else "long"
        running += end(made, plan_id, gives.get(tenant, 32))
        if tenant in given:
            given[tenant] += 64 + gives[tenant]
    # What still runs was charged as expected and is corrected when it ends.
    assert given["brief"] / given["long"] == pytest.approx(1.0, abs=0.15)


def test_what_could_never_fit_does_not_wait() -> None:
    made = stage()
    fill(made)
    ask(made, 11)
    (reply,) = refused(ask(made, 12, prompt_tokens=4000))
    assert reply.failure.kind is FailureKind.BAD_REQUEST


def test_a_request_that_a_worker_failed_does_not_wait_again_where_there_is_room() -> None:
    made = stage()
    made.enter("d1")
    for plan_id in range(1, 21):
        ask(made, plan_id)
    ask(made, 21, prompt_tokens=60 * 32)
    end(made, 1)
    assert granted(ask(made, 22, prompt_tokens=32, resumed=True)) == [22]


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
    event = PlanRequested(session=1, plan_id=1, request_id="r", prompt_tokens=1, output_tokens_max=1, **fields)
    assert class_of(event) is expected


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
    pace_s = 0.1
    for plan_id in range(11, 61):
        ask(made, plan_id, tenant="t")
        made.now_s += pace_s
        end(made, plan_id - 10)
    for plan_id in range(61, 111):
        assert isinstance(ask(made, plan_id, tenant="t")[0], ReplyWaiting)
    # Fifty wait, and ten are served a second.
    (reply,) = refused(ask(made, 111, tenant="t", wait_max_s=2.0))
    assert (reply.cause, reply.failure.kind) == ("wait_too_long", FailureKind.EXHAUSTED)
    assert reply.failure.retry_after_s == pytest.approx(5.0, rel=0.2)
    assert isinstance(ask(made, 112, tenant="t", wait_max_s=8.0)[0], ReplyWaiting)
    assert isinstance(ask(made, 113, tenant="other", wait_max_s=2.0)[0], ReplyWaiting), "it has nobody before it"


def test_a_wait_ends_in_time() -> None:
    made = stage()
    fill(made)
    ask(made, 11, priority_class="interactive")
    ask(made, 12, wait_max_s=7.0)
    made.now_s = 0.4
    assert made.do(Tick()) == []
    made.now_s = 0.5
    (reply,) = refused(made.do(Tick()))
    assert (reply.plan_id, reply.cause, reply.failure.kind) == (11, "waited_out", FailureKind.EXHAUSTED)
    made.report("d0")
    made.now_s = 7.0
    (reply,) = refused(made.do(Tick()))
    assert reply.plan_id == 12


def test_when_a_class_is_full_the_tenant_with_the_most_gives_way() -> None:
    few = PriorityClassConfig(waiting_max=4)
    made = stage(waiting=WaitingConfig(default=few))
    fill(made)
    for plan_id in range(11, 15):
        ask(made, plan_id, tenant="greedy")
    (reply,) = refused(ask(made, 15, tenant="greedy"))
    assert (reply.plan_id, reply.cause) == (15, "queue_full")
    rejected, waits = ask(made, 16, tenant="modest")
    assert isinstance(rejected, ReplyRefusal) and rejected.plan_id == 14
    assert isinstance(waits, ReplyWaiting)
    assert isinstance(ask(made, 17, tenant="modest")[0], ReplyRefusal)
    (last,) = refused(ask(made, 18, tenant="modest"))
    assert last.plan_id == 18, "two and two: nobody has more than he would"


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


def test_a_new_scheduler_lets_requests_wait_for_workers_that_may_come_back() -> None:
    made = Stage(waiting=WaitingConfig())
    made.core = SchedulerCore(made.core._config, began_s=0.0)
    made.do(FrontJoined(session=FRONT, front_proxy_id="f"))
    assert isinstance(ask(made, 1)[0], ReplyWaiting)
    made.join("d0")
    assert granted(made.report("d0")) == [1]
    made.report("d0", ready(kv_blocks_used=100))
    made.now_s = math.nextafter(3.0, 4.0)
    made.do(Tick())
    assert isinstance(ask(made, 2)[0], ReplyWaiting)


def test_the_wait_for_workers_that_may_come_back_is_longer_than_the_wait_for_room() -> None:
    made = stage(silence_timeout_s=3.0)
    fill(made)
    made.now_s = 3.0
    made.do(Tick())
    assert ask(made, 11, priority_class="interactive") == [ReplyWaiting(session=FRONT, plan_id=11, wait_max_s=5.0)]
    ask(made, 12, priority_class="interactive", wait_max_s=2.0)
    for now_s in (3.5, 4.0, 4.9):
        made.now_s = now_s
        assert made.do(Tick()) == []
    made.now_s = 5.0
    assert [reply.plan_id for reply in refused(made.do(Tick()))] == [12], "nobody waits for longer than he said"
    made.now_s = 7.0
    assert made.report("d0") == [PublishView(at_once=True)], "it is back, and full"
    made.now_s = 7.4
    assert made.do(Tick()) == []
    made.now_s = 7.5
    assert [reply.plan_id for reply in refused(made.do(Tick()))] == [11], "from its return the wait is one for room"


def test_a_wait_for_workers_ends_too() -> None:
    made = stage(silence_timeout_s=3.0, worker_lease_s=60.0)
    fill(made)
    ask(made, 11, priority_class="interactive")
    made.now_s = 0.4
    made.do(Tick())
    made.now_s = 3.0
    assert [reply.plan_id for reply in refused(made.do(Tick()))] == [11], "it waited for room"
    ask(made, 12, priority_class="interactive")
    made.now_s = 7.9
    assert made.do(Tick()) == []
    made.now_s = 8.0
    assert [reply.plan_id for reply in refused(made.do(Tick()))] == [12]


@pytest.mark.parametrize("first", [(), ("d0",)])
def test_after_a_start_an_interactive_request_waits_for_the_workers_that_return(first: tuple[str, ...]) -> None:
    made = Stage(waiting=WaitingConfig())
    made.core = SchedulerCore(made.core._config, began_s=0.0)
    made.do(FrontJoined(session=FRONT, front_proxy_id="f"))
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
    answers: list[ReplyRefusal] = []
    for second in range(2, 3 * 3600):
        made.now_s = float(second)
        made.report("d0", ready(kv_blocks_used=100))
        answers += refused([*ask(made, 100 + 2 * second), *ask(made, 101 + 2 * second), *made.do(Tick())])
    # All but those who may still wait.
    assert len(answers) >= 2 * (3 * 3600 - 2) - 2 * 21
    assert all(each.failure.retry_after_s for each in answers)
