"""Retries are bounded for one request and for all together."""

from __future__ import annotations

import heapq
import random

from front_proxy.retries import PAUSE_GROWTH_MAX, ReplanPace, Retries, RetryBounds, RetryBudget

BOUNDS = RetryBounds(attempts_max=3, resumes_max=2, replans_max=6, replan_wait_s=0.1)


def middle() -> float:
    return 0.5


def at_once() -> float:
    return 0.0


def test_a_full_bucket_moves_a_whole_worker_at_once_and_then_no_more() -> None:
    budget = RetryBudget(ratio=0.0, per_s=0.0, burst_max=5, now_s=0.0)
    assert [budget.take(0.0) for _ in range(7)] == [True] * 5 + [False] * 2


def test_in_the_long_run_retries_are_a_share_of_the_requests_and_a_floor_each_second() -> None:
    budget = RetryBudget(ratio=0.5, per_s=2.0, burst_max=4, now_s=0.0)
    taken = 0
    for tenth in range(1000):
        budget.request_came()
        taken += sum(budget.take(tenth / 10) for _ in range(5))
    assert 0.95 * (4 + 1000 * 0.5 + 100 * 2) <= taken <= 4 + 1000 * 0.5 + 100 * 2


def test_no_time_and_no_number_of_requests_fills_it_beyond_the_burst() -> None:
    budget = RetryBudget(ratio=1.0, per_s=1.0, burst_max=3, now_s=0.0)
    for _ in range(10):
        budget.request_came()
    assert budget.tokens == 3
    assert [budget.take(1000.0) for _ in range(5)] == [True] * 3 + [False] * 2


def test_a_clock_that_went_back_counts_no_time_twice() -> None:
    budget = RetryBudget(ratio=0.0, per_s=1.0, burst_max=1, now_s=0.0)
    assert [budget.take(now_s) for now_s in (10.0, 9.0, 10.0, 11.0)] == [True, False, False, True]


def test_a_clock_that_stands_still_fills_nothing() -> None:
    budget = RetryBudget(ratio=0.0, per_s=1000.0, burst_max=1, now_s=5.0)
    assert budget.take(5.0) and not budget.take(5.0) and not budget.take(4.0)


def test_tries_in_a_row_are_bounded_and_progress_begins_them_anew_a_bounded_number_of_times() -> None:
    retries = Retries(BOUNDS, lambda: True, at_once, middle)
    tries = 1
    while retries.again():
        tries += 1
        retries.exclude(f"worker-{tries}")
        if tries % 2 == 0:
            retries.progressed()
            assert retries.excluded == [] or tries > 4
    assert tries < retries.attempts_bound
    assert Retries(BOUNDS, lambda: False, at_once, middle).again() is False


def test_a_try_that_is_not_allowed_does_not_cost_the_budget() -> None:
    asked: list[bool] = []

    def budget() -> bool:
        asked.append(True)
        return True

    retries = Retries(BOUNDS, budget, at_once, middle)
    assert [retries.again() for _ in range(5)] == [True, True, False, False, False]
    assert len(asked) == 2


def test_what_waits_for_the_same_worker_does_not_come_back_as_one() -> None:
    rng = random.Random(7)
    first = [Retries(BOUNDS, lambda: True, at_once, rng.random).pause_s() or 0.0 for _ in range(100)]
    assert len(set(first)) == 100
    assert all(0.5 * BOUNDS.replan_wait_s <= pause_s < 1.5 * BOUNDS.replan_wait_s for pause_s in first)


def test_pauses_grow_to_a_bound_and_end() -> None:
    retries = Retries(BOUNDS, lambda: True, at_once, middle)
    retries.exclude("decode-0")
    pauses = [retries.pause_s() for _ in range(7)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 0.1 * PAUSE_GROWTH_MAX, 0.1 * PAUSE_GROWTH_MAX, None]
    assert retries.excluded == []


def test_replans_beyond_the_budget_wait_for_their_turn_one_after_the_other() -> None:
    pace = ReplanPace(per_s=4.0, burst_max=3, waiting_max=1000, now_s=0.0)
    assert [pace.wait_s(0.0) for _ in range(6)] == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75]
    assert pace.wait_s(0.5) == 0.5, "who comes later waits behind those who came before"
    assert pace.wait_s(100.0) == 0.0, "and nobody waits for a storm that is over"
    assert [pace.wait_s(100.0) for _ in range(3)] == [0.0, 0.0, 0.25]


def test_however_many_ask_again_they_are_bounded_and_each_gets_its_turn() -> None:
    pace, rng = ReplanPace(per_s=50.0, burst_max=20, waiting_max=1000, now_s=0.0), random.Random(3)
    due = [(rng.uniform(0.0, 2.0), 1) for _ in range(1000)]
    heapq.heapify(due)
    asked: list[float] = []
    while due:
        at_s, times = heapq.heappop(due)
        # Refused, and planned again when its pause is over: each is asked for three times.
        again_s = at_s + pace.wait_s(at_s)
        asked.append(again_s)
        if times < 3:
            heapq.heappush(due, (again_s, times + 1))
    assert len(asked) == 3000
    asked.sort()
    assert all(count <= 20 + 50.0 * at_s + 1e-6 for count, at_s in enumerate(asked, start=1))
    assert asked[-1] <= 3000 / 50.0, "none is put off for longer than all before it take"


def test_what_is_promised_to_those_who_give_up_before_their_turn_is_bounded() -> None:
    pace = ReplanPace(per_s=250.0, burst_max=512, waiting_max=1024, now_s=0.0)
    # A minute without anybody to ask, and clients that give up after two seconds and ask anew.
    waits = [pace.wait_s(at_s / 10) for at_s in range(600) for _ in range(1024)]
    assert max(waits) == 1024 / 250.0
    assert pace.wait_s(60.0 + 1024 / 250.0) == 0.0


def test_a_pause_is_as_long_as_the_front_proxys_turn_is_away() -> None:
    retries = Retries(BOUNDS, lambda: True, lambda: 7.0, middle)
    assert [retries.pause_s() for _ in range(7)] == [7.0] * 6 + [None]
