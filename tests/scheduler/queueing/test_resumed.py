"""Resumed requests: a worker failed them, so they wait ahead of new ones, also for a worker."""

from __future__ import annotations

import pytest

from scheduler.api.actions import ReplyWaiting
from scheduler.api.events import Tick, WorkerLeft
from scheduler.config import PriorityClassConfig, WaitingConfig
from tests.scheduler.cast import FRONT, Stage
from tests.scheduler.queueing.queue_stage import ask, end, fill, granted, refused, stage, tick, waiting

# The only worker failed it before.
FAILED = {"resumed": True, "excluded_worker_ids": frozenset({"d0"})}


def leave(made: Stage, worker_id: str) -> None:
    made.do(WorkerLeft(session=made.session_of[worker_id], worker_id=worker_id, reason="gone"))


def test_they_go_before_new_ones_of_their_class_in_the_order_of_their_coming() -> None:
    made = stage()
    fill(made)
    for plan_id in range(11, 16):
        ask(made, plan_id, resumed=plan_id in (13, 14))
    assert [end(made, plan_id) for plan_id in range(1, 6)] == [[13], [14], [11], [12], [15]]


def test_they_do_not_go_before_a_class_with_more_weight() -> None:
    made = stage()
    fill(made)
    ask(made, 11, priority_class="batch", resumed=True)
    ask(made, 12, priority_class="batch", resumed=True)
    ask(made, 13, priority_class="interactive")
    assert [end(made, 1), end(made, 2)] == [[11], [13]]


def test_no_length_of_the_class_and_no_shorter_wait_bounds_them() -> None:
    made = stage(waiting_max=0, waiting=WaitingConfig(default=PriorityClassConfig(wait_max_s=0.5)))
    fill(made)
    assert ask(made, 11, resumed=True) == [ReplyWaiting(session=FRONT, plan_id=11, wait_max_s=30.0)]
    assert ask(made, 12, resumed=True, wait_max_s=3.0) == [ReplyWaiting(session=FRONT, plan_id=12, wait_max_s=3.0)]
    assert granted(tick(made, 29.0)) == [] and end(made, 1) == [11]


def test_one_does_not_wait_where_there_is_room() -> None:
    made = stage()
    made.enter("d1")
    fill(made, 20)
    ask(made, 21, prompt_tokens=60 * 32)
    end(made, 1)
    assert granted(ask(made, 22, prompt_tokens=32, resumed=True)) == [22]


def test_one_waits_for_a_worker_where_a_new_one_is_refused() -> None:
    made = stage(silence_timeout_s=3.0)
    leave(made, "d0")
    made.now_s = 3.0
    assert refused(ask(made, 1)) == [(1, "unavailable", "no_worker")]
    ask(made, 2, resumed=True)
    ask(made, 3, resumed=True, wait_max_s=1.0)
    made.now_s = 4.0
    assert refused(made.do(Tick())) == [(3, "unavailable", "no_worker")]
    made.join("d0", epoch=2)
    assert granted(made.report("d0")) == [2]


def test_one_that_failed_everywhere_is_tried_again_after_a_pause() -> None:
    made = stage()
    ask(made, 1, **FAILED)
    assert granted(tick(made, 0.9)) == []
    assert granted(tick(made, 1.0)) == [1]


def test_one_that_no_worker_can_take_at_present_holds_up_nothing() -> None:
    made = stage()
    fill(made)
    for plan_id in (11, 12):
        ask(made, plan_id, **FAILED)
    ask(made, 13)
    assert end(made, 1) == [13]
    made.now_s = 0.5
    ask(made, 14, resumed=True)
    assert waiting(made) == 3
    # Those set aside stand before the one that came later.
    assert granted(tick(made, 1.0)) == []
    assert [end(made, plan_id) for plan_id in (2, 3, 4)] == [[11], [12], [14]]


def test_one_that_was_set_aside_costs_no_new_one_its_place_and_can_be_taken_back() -> None:
    made = stage(waiting_max=0)
    ask(made, 1, **FAILED)
    assert granted(ask(made, 2)) == [2]
    assert end(made, 1) == [] and granted(tick(made, 1.0)) == []


@pytest.mark.parametrize("resumed", [False, True])
def test_what_can_never_fit_is_refused_at_once(resumed: bool) -> None:
    made = stage()
    fill(made)
    ask(made, 11)
    assert refused(ask(made, 12, prompt_tokens=100 * 32 + 1, resumed=resumed)) == [(12, "bad_request", "too_large")]
