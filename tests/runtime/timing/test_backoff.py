"""Exponential backoff."""

from __future__ import annotations

from runtime.timing.backoff import backoff_s


def test_waits_double_up_to_the_bound_however_many_failures() -> None:
    assert [backoff_s(failures, min_s=0.5, max_s=3.0) for failures in (1, 2, 3, 4, 9999)] == [0.5, 1.0, 2.0, 3.0, 3.0]
