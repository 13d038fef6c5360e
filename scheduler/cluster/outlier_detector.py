"""Whether a worker that says it is well does its work: ejected when it does not, let back in on trial. Pure.

In service -> ejected, by failures in a row or by their share of what ended lately. Ejected -> on probation, when its
time is over. On probation one request is let through: when it finishes the worker is back, when it fails the worker is
ejected for twice as long. How many of a pool may be out at once is the caller's to say.

A request may be at fault itself. So a front proxy reports a failure inside an engine only when the request then
succeeded elsewhere.
"""

from __future__ import annotations

import enum

from runtime.timing.backoff import backoff_s
from runtime.timing.decaying_rate import DecayingRate
from scheduler.config import OutlierLimits


class Standing(enum.StrEnum):
    """Whether a worker gets requests."""

    IN_SERVICE = "in_service"
    EJECTED = "ejected"
    PROBATION = "probation"


class WorkerHealth:
    """One incarnation's record. Time is an argument and never goes back."""

    def __init__(self, config: OutlierLimits) -> None:
        self.standing = Standing.IN_SERVICE
        self.probe: tuple[int, int] | None = None
        """The plan on which the verdict depends, while on probation."""
        self._config = config
        # Failures since the last success.
        self._in_a_row = 0
        # What ended lately, well or not.
        self._good = DecayingRate(config.window_s)
        self._bad = DecayingRate(config.window_s)
        self._until_s = float("-inf")
        self._ejections = 0

    @property
    def avoided(self) -> bool:
        """Whether it gets nothing now."""
        match self.standing:
            case Standing.IN_SERVICE:
                return False
            case Standing.EJECTED:
                return True
            case Standing.PROBATION:
                return self.probe is not None

    def succeeded(self, key: tuple[int, int], now_s: float) -> None:
        """A request finished there. Of an ejected worker only the probe counts: others began before."""
        self._good.at(now_s)
        self._good.add(1.0)
        if self.standing is Standing.IN_SERVICE:
            self._in_a_row = 0
            if self._ejections and now_s >= self._until_s + self._length_s():
                self._ejections = 0
        elif key == self.probe:
            self.standing, self.probe = Standing.IN_SERVICE, None
            self._in_a_row = 0
            self._good, self._bad = DecayingRate(self._config.window_s), DecayingRate(self._config.window_s)
            self._until_s = now_s

    def failed(self, now_s: float) -> bool:
        """A request or a stream failed there. True: it should be ejected."""
        for ended in (self._good, self._bad):
            ended.at(now_s)
        self._bad.add(1.0)
        self._in_a_row += 1
        match self.standing:
            case Standing.EJECTED:
                return False
            case Standing.PROBATION:
                return True
            case Standing.IN_SERVICE:
                return self._fails

    def eject(self, now_s: float) -> float:
        """Out, for twice as long as the last time; returns for how long."""
        self._ejections += 1
        length_s = self._length_s()
        self.standing, self.probe = Standing.EJECTED, None
        self._until_s = now_s + length_s
        return length_s

    def planned(self, key: tuple[int, int]) -> None:
        """A request was sent there."""
        if self.standing is Standing.PROBATION and self.probe is None:
            self.probe = key

    def ended(self, key: tuple[int, int]) -> None:
        """A request is over, whatever came of it: where nothing did, another one may try."""
        if self.probe == key:
            self.probe = None

    def look(self, now_s: float) -> bool:
        """Let an ejection run out. True when it did."""
        if self.standing is not Standing.EJECTED or now_s < self._until_s:
            return False
        self.standing = Standing.PROBATION
        return True

    @property
    def _fails(self) -> bool:
        """Whether what is counted is enough to eject a worker in service."""
        config = self._config
        ended = self._good.amount + self._bad.amount
        return self._in_a_row >= config.failures_in_a_row or (
            ended >= config.requests_min and self._bad.amount >= config.failure_ratio * ended
        )

    def _length_s(self) -> float:
        config = self._config
        return backoff_s(max(self._ejections, 1), min_s=config.ejection_s, max_s=config.ejection_max_s)
