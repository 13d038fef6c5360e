"""Retries are bounded for one request and for all together."""

from __future__ import annotations

from front_proxy.request.retry_policy import RetryBudget, RetryPolicy

ATTEMPTS_MAX, RESUMES_MAX = 3, 2


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
    assert [budget.take(1000.0) for _ in range(5)] == [True] * 3 + [False] * 2


def test_tries_in_a_row_are_bounded_and_progress_begins_them_anew_a_bounded_number_of_times() -> None:
    retries = RetryPolicy(ATTEMPTS_MAX, RESUMES_MAX, lambda: True)
    tries = 1
    while retries.again():
        tries += 1
        retries.exclude(f"worker-{tries}")
        if tries % 2 == 0:
            retries.progressed()
            assert retries.excluded == [] or tries > 4
    assert tries < retries.attempts_bound
    assert RetryPolicy(ATTEMPTS_MAX, RESUMES_MAX, lambda: False).again() is False


def test_a_try_that_is_not_allowed_does_not_cost_the_budget() -> None:
    asked: list[bool] = []

    def budget() -> bool:
        asked.append(True)
        return True

    retries = RetryPolicy(ATTEMPTS_MAX, RESUMES_MAX, budget)
    assert [retries.again() for _ in range(5)] == [True, True, False, False, False]
    assert len(asked) == 2
