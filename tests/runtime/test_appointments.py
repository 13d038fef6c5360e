"""Times to come back: apart from each other, no sooner than asked for, and bounded."""

from __future__ import annotations

import pytest

from runtime.appointments import Appointments


def test_those_who_are_told_at_once_come_back_one_after_the_other() -> None:
    book = Appointments(share=0.5, max_s=100.0)
    told = [book.book(10, 0.0, pace=4.0, not_before_s=1.0) for _ in range(4)]
    assert told == [1.0, 6.0, 11.0, 16.0]
    assert book.until_s == 21.0


def test_what_is_owed_is_served_meanwhile() -> None:
    book = Appointments(share=0.5, max_s=100.0)
    for _ in range(4):
        book.book(10, 0.0, pace=4.0, not_before_s=0.0)
    assert book.book(10, 15.0, pace=4.0, not_before_s=15.0) == 20.0
    assert book.book(10, 99.0, pace=4.0, not_before_s=99.0) == 99.0


def test_when_the_pace_falls_what_is_owed_takes_longer() -> None:
    book = Appointments(share=1.0, max_s=100.0)
    book.book(10, 0.0, pace=10.0, not_before_s=0.0)
    assert book.book(10, 0.0, pace=1.0, not_before_s=0.0) == 10.0


def test_beyond_the_bound_times_are_spread_and_the_book_does_not_grow() -> None:
    book = Appointments(share=1.0, max_s=60.0)
    told = sorted(book.book(1, 0.0, pace=1.0, not_before_s=0.0) for _ in range(560))
    assert told[:30] == pytest.approx(range(30)) and told[-1] <= 60.0
    late = [at_s for at_s in told if at_s >= 30.0]
    assert max(sum(second <= at_s < second + 1 for at_s in late) for second in range(30, 60)) <= 20
    assert book.until_s == 60.0
    assert book.book(1, 0.0, pace=1.0, not_before_s=75.0) == 75.0, "a longer line is told all the same"


@pytest.mark.parametrize("pace", [0.0, 5e-324, 1e-300])
def test_a_pace_next_to_nothing_is_a_slow_one(pace: float) -> None:
    book = Appointments(share=0.125, max_s=60.0)
    assert all(0.0 <= book.book(1, float(second), pace=pace, not_before_s=0.0) - second <= 60.0 for second in range(9))


@pytest.mark.parametrize("max_s", [15.0, 1000.0])
def test_who_is_only_told_and_comes_when_he_likes_takes_nobody_s_time(max_s: float) -> None:
    alone, among = Appointments(share=0.5, max_s=max_s), Appointments(share=0.5, max_s=max_s)
    for _ in range(5):
        for _ in range(100):
            among.book(10, 0.0, pace=4.0, not_before_s=1.0, noted=False)
        told = alone.book(10, 0.0, pace=4.0, not_before_s=1.0)
        assert among.book(10, 0.0, pace=4.0, not_before_s=1.0) == told
        assert among.until_s == alone.until_s
