"""Whether a worker that says it is well does its work: ejected when it does not, let back in on trial. Pure.

In service -> ejected, by failures in a row or by their share of what ended lately. Ejected -> on probation, when its
time is over. On probation one request is let through: when it finishes the worker is back, when it fails the worker is
ejected for twice as long. How many of a pool may be out at once is the caller's to say.

A request may be at fault itself: what fails at two workers is not held against either of them (``FailedRequests``).
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from runtime.fading import left_after
from scheduler.config import OutlierConfig


class Standing(enum.StrEnum):
    """How a worker stands with those who send it requests."""

    IN_SERVICE = "in_service"
    EJECTED = "ejected"
    PROBATION = "probation"


class WorkerHealth:
    """One incarnation's record. Time is an argument and never goes back."""

    __slots__ = (
        "_at_s",
        "_bad",
        "_before",
        "_config",
        "_ejected_by",
        "_ejections",
        "_failures",
        "_good",
        "_in_a_row",
        "_row",
        "_until_s",
        "probe",
        "standing",
    )

    def __init__(self, config: OutlierConfig) -> None:
        self.standing = Standing.IN_SERVICE
        self.probe: tuple[int, int] | None = None
        """The plan on which the verdict depends, while on probation."""
        self._config = config
        # Failures since the last success, and how often they were counted anew.
        self._in_a_row = 0
        self._row = 0
        self._good = 0.0
        self._bad = 0.0
        self._at_s = 0.0
        self._until_s = float("-inf")
        self._ejections = 0
        # All failures ever, and which of them was followed by its last ejection.
        self._failures = 0
        self._ejected_by = 0
        # How it stood before its last ejection, and until when the one before that lasted.
        self._before = (Standing.IN_SERVICE, self._until_s)

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
        self._fade(now_s)
        self._good += 1.0
        if self.standing is Standing.IN_SERVICE:
            self._begin_row()
            if now_s >= self._until_s + self._length_s():
                self._ejections = 0
        elif key == self.probe:
            self.standing, self.probe = Standing.IN_SERVICE, None
            self._begin_row()
            self._good, self._bad = 0.0, 0.0
            self._until_s = now_s

    def failed(self, now_s: float) -> bool:
        """A request or a stream failed there. True: it should be ejected."""
        self._fade(now_s)
        self._bad += 1.0
        self._in_a_row += 1
        self._failures += 1
        match self.standing:
            case Standing.EJECTED:
                return False
            case Standing.PROBATION:
                return True
            case Standing.IN_SERVICE:
                return self._fails

    def last_failure(self, now_s: float) -> CountedFailure:
        """What was just counted, so that it can be taken back."""
        return CountedFailure(health=self, number=self._failures, row=self._row, at_s=now_s)

    def take_back(self, failure: CountedFailure, now_s: float) -> bool:
        """A failure was the request's own. True: without it the worker would not be out, and it is as before."""
        assert failure.health is self
        self._fade(now_s)
        self._bad = max(0.0, self._bad - self._kept(now_s - failure.at_s))
        if failure.row == self._row:
            self._in_a_row = max(0, self._in_a_row - 1)
        if self.standing is not Standing.EJECTED:
            return False
        standing, until_s = self._before
        if standing is Standing.IN_SERVICE and self._fails:
            return False
        # On probation one failure is enough to be ejected. Those before it were not its cause.
        if standing is not Standing.IN_SERVICE and failure.number != self._ejected_by:
            return False
        self.standing, self._until_s = standing, until_s
        self._ejections -= 1
        return True

    def eject(self, now_s: float) -> float:
        """Out, for twice as long as the last time; returns for how long."""
        self._before = (self.standing, self._until_s)
        self._ejected_by = self._failures
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
        """Whether what is counted is enough to eject who is in service."""
        config = self._config
        ended = self._good + self._bad
        return self._in_a_row >= config.failures_in_a_row or (
            ended >= config.requests_min and self._bad >= config.failure_ratio * ended
        )

    def _begin_row(self) -> None:
        self._in_a_row = 0
        self._row += 1

    def _length_s(self) -> float:
        doubled = self._config.ejection_s * 2.0 ** max(0, min(self._ejections - 1, 60))
        return min(doubled, self._config.ejection_max_s)

    def _fade(self, now_s: float) -> None:
        kept = self._kept(now_s - self._at_s)
        self._good *= kept
        self._bad *= kept
        self._at_s = max(self._at_s, now_s)

    def _kept(self, elapsed_s: float) -> float:
        """What is left of one failure after so long."""
        return left_after(elapsed_s, self._config.window_s)


class CountedFailure(msgspec.Struct, frozen=True, eq=False):
    """One failure that counts against a worker's incarnation: its ``number`` there, and which run it belongs to."""

    health: WorkerHealth
    number: int
    row: int
    at_s: float


class _FailedRequest(msgspec.Struct):
    """``counted``: the one failure held against a worker; None where the request itself is at fault."""

    counted: CountedFailure | None
    at_s: float


class FailedRequests:
    """The last requests that failed at a worker, the latest at the end: bounded in number and age."""

    def __init__(self, config: OutlierConfig) -> None:
        self._config = config
        self._failed: OrderedDict[str, _FailedRequest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failed)

    def judge(self, request_id: str, health: WorkerHealth, now_s: float) -> Sequence[CountedFailure] | None:
        """None: its failure counts, then tell of it by ``count``. Else it does not, nor do those it returns any more.

        What one request did to a worker counts once. A second worker says that it is the request.
        """
        while self._failed and next(iter(self._failed.values())).at_s <= now_s - self._config.failed_request_age_s:
            self._failed.popitem(last=False)
        known = self._failed.get(request_id)
        if known is None:
            return None
        known.at_s = now_s
        self._failed.move_to_end(request_id)
        if known.counted is None or known.counted.health is health:
            return ()
        taken_back, known.counted = known.counted, None
        return (taken_back,)

    def count(self, request_id: str, failure: CountedFailure) -> None:
        """Remember a failure that counts."""
        assert request_id not in self._failed, request_id
        self._failed[request_id] = _FailedRequest(counted=failure, at_s=failure.at_s)
        if len(self._failed) > self._config.failed_requests_max:
            self._failed.popitem(last=False)
