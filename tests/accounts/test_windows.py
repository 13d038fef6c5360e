"""Windows begin at midnights of a zone, also where its clocks change, and never go back."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

from accounts.windows import WINDOWS, Calendar

BERLIN = ZoneInfo("Europe/Berlin")


def at(*moment: int) -> float:
    return datetime(*moment, tzinfo=BERLIN).timestamp()  # type: ignore[misc,arg-type]


def test_a_day_a_week_and_a_month_begin_at_midnight_of_the_zone() -> None:
    # A Sunday, on which the clocks go back.
    starts = Calendar("Europe/Berlin").starts(at(2026, 10, 25, 23, 30))
    assert starts == (at(2026, 10, 25), at(2026, 10, 19), at(2026, 10, 1), 0)


def test_they_end_where_the_next_ones_begin() -> None:
    calendar = Calendar("Europe/Berlin")
    starts = calendar.starts(at(2026, 10, 25, 23, 30))
    ends = [calendar.ends(window, start) for window, start in zip(WINDOWS, starts, strict=True)]
    assert ends == [at(2026, 10, 26), at(2026, 10, 26), at(2026, 11, 1), float("inf")]
    assert calendar.starts(ends[0] - 1) is starts
    assert calendar.starts(ends[0])[0] == ends[0]


def test_a_clock_that_goes_back_begins_no_window_again() -> None:
    calendar = Calendar("Europe/Berlin")
    today = calendar.starts(at(2026, 10, 26))
    assert calendar.starts(at(2026, 10, 25, 23, 59)) is today
