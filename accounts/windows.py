"""Windows of budgets: days, weeks and months of a time zone. They are derived from the time: nothing is ever reset."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal, get_args
from zoneinfo import ZoneInfo

Window = Literal["day", "week", "month", "total"]
WINDOWS: tuple[Window, ...] = get_args(Window)

Starts = tuple[int, int, int, int]
"""When the present day, week, month and total began, in seconds of wall-clock time; total: 0."""


class Calendar:
    """Tells the windows of a time that never goes back: where the clock does, the latest one seen stays."""

    def __init__(self, timezone: str) -> None:
        self.zone = timezone
        self._zone = ZoneInfo(timezone)
        self._until_s = float("-inf")
        self._starts: Starts = (0, 0, 0, 0)
        # The day that ``at`` was asked for last.
        self._day: Calendar | None = None

    def starts(self, now_s: float) -> Starts:
        """The same object for all of one day."""
        if now_s >= self._until_s:
            today = datetime.fromtimestamp(now_s, self._zone).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
            self._starts = _seconds(today), _seconds(_monday(today)), _seconds(today.replace(day=1)), 0
            self._until_s = _seconds(today + timedelta(days=1))
        return self._starts

    def at(self, moment_s: float) -> Starts:
        """The windows of any moment."""
        day = self._day
        if day is not None and day._starts[0] <= moment_s < day._until_s:
            return day._starts
        day = self._day = Calendar(self.zone)
        return day.starts(moment_s)

    def ends(self, window: Window, start_s: int) -> float:
        """When the window that began then is over; infinity for total."""
        if window == "total":
            return float("inf")
        start = datetime.fromtimestamp(start_s, self._zone)
        if window == "month":
            return _seconds((start.replace(day=1) + timedelta(days=32)).replace(day=1))
        return _seconds(start + timedelta(days=7 if window == "week" else 1))


def _monday(today: datetime) -> datetime:
    return today - timedelta(days=today.weekday())


def _seconds(moment: datetime) -> int:
    """Sums of days are of the calendar: each midnight is the zone's own, also behind a change of the clocks."""
    return int(moment.timestamp())
