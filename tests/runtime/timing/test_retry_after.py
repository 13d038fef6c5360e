"""Retry-After follows the queue, within bounds, and differs among requests that are refused together."""

from __future__ import annotations

import pytest

from runtime.timing.retry_after import retry_after_s


@pytest.mark.parametrize(
    ("queued", "rate_per_s", "told_s"),
    [(100.0, 10.0, 10.0), (0.0, 10.0, 2.0), (1e9, 10.0, 40.0), (100.0, None, 2.0), (100.0, 1e-6, 40.0)],
)
def test_it_is_the_queue_over_its_pace_in_bounds(queued: float, rate_per_s: float | None, told_s: float) -> None:
    assert retry_after_s(queued, rate_per_s, draw=0.5) == told_s


def test_requests_refused_together_are_told_times_from_half_of_it_to_half_more() -> None:
    told = [retry_after_s(1e9, 10.0, draw=draw / 10) for draw in range(10)]
    assert told[0] == 20.0 and told[-1] < 60.0 and len(set(told)) == 10
