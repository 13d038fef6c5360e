"""A pace follows what comes, forgets what came, and is never a number by which nothing can be divided."""

from __future__ import annotations

import pytest

from runtime.timing.decaying_rate import PACE_MIN_PER_S, DecayingRate


def steady(per_s: float, for_s: int) -> DecayingRate:
    rate = DecayingRate(window_s=10.0)
    for second in range(for_s):
        rate.at(float(second))
        rate.add(per_s)
    rate.at(float(for_s))
    return rate


@pytest.mark.parametrize("for_s", [1, 10, 100])
def test_a_steady_pace_is_known_from_the_first_second(for_s: int) -> None:
    assert steady(50.0, for_s).per_s == pytest.approx(50.0, rel=0.12)


def test_a_new_pace_takes_the_place_of_the_old_one() -> None:
    rate = steady(50.0, 100)
    for second in range(100, 140):
        rate.at(float(second))
        rate.add(10.0)
    assert rate.per_s == pytest.approx(10.0, rel=0.2)


def test_time_that_does_not_count_changes_nothing() -> None:
    rate = steady(50.0, 100)
    rate.at(100.0, counts=False)
    before = rate.per_s
    rate.at(5000.0)
    rate.at(4000.0)
    assert rate.per_s == before is not None


def test_before_it_is_known_there_is_no_pace() -> None:
    rate = DecayingRate(window_s=10.0)
    rate.at(1000.0)
    rate.add(5.0)
    rate.at(1000.4)
    assert rate.per_s is None


@pytest.mark.parametrize("interval_s", [0.1, 0.5, 1.0, 2.0, 300.0])
def test_hours_in_which_nothing_comes_end_a_pace(interval_s: float) -> None:
    rate = DecayingRate(window_s=10.0)
    rate.at(0.0)
    rate.add(200.0)
    for turn in range(1, int(3 * 3600 / interval_s)):
        rate.at(turn * interval_s)
        assert rate.per_s is None or rate.per_s >= PACE_MIN_PER_S
    assert rate.per_s is None
