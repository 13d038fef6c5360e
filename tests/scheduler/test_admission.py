"""When a refused request should come back."""

from __future__ import annotations

import pytest

from runtime.release_rate import ReleaseRate
from scheduler.admission import Admission


def admission() -> Admission:
    return Admission(
        plans_in_flight_max=2,
        retry_after_min_s=0.1,
        retry_after_max_s=10.0,
        release_window_s=10.0,
        come_back_share=0.25,
    )


def test_the_release_rate_approaches_a_steady_pace_and_fades() -> None:
    rate = ReleaseRate(window_s=10.0)
    for second in range(100):
        rate.released(50, float(second))
    assert rate.per_s(99.0) == pytest.approx(50, rel=0.06)
    assert rate.per_s(200.0) < 0.01


def test_advice_is_the_shortage_over_the_pace() -> None:
    judge = admission()
    judge.released(100, 0.0)
    assert judge.retry_after_s(20, 0.0) == pytest.approx(2.0)


def test_those_who_are_refused_together_do_not_come_back_together() -> None:
    judge = admission()
    judge.released(1000, 0.0)
    told = [judge.retry_after_s(20, 0.0) for _ in range(100)]
    assert told[:4] == pytest.approx([0.2, 1.0, 1.8, 2.6])
    assert len(set(told)) == 100 and max(told) <= 10.0


@pytest.mark.parametrize(("released", "advice_s"), [(0, 1.0), (1, 10.0), (10_000, 0.1)])
def test_advice_stays_within_its_bounds(released: int, advice_s: float) -> None:
    judge = admission()
    judge.released(released, 0.0)
    assert judge.retry_after_s(20, 0.0) == advice_s


@pytest.mark.parametrize(("in_flight", "room"), [(0, True), (1, True), (2, False)])
def test_plans_in_flight_have_a_bound(in_flight: int, room: bool) -> None:
    assert admission().has_room(in_flight) is room
