"""Counts the requests in flight and decides, for both APIs, whether one more may enter (bound, draining)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from front_proxy.gateway.metrics import REFUSALS
from runtime.failures import Failure, FailureError, FailureKind


class InFlight:
    """A request counts as one, or as its running sequences (children of n > 1) if those are more."""

    def __init__(self, count_max: int, *, usable: Callable[[], bool], retry_after_s: float) -> None:
        """``usable``: whether the cluster could serve a request."""
        self.count_max = count_max
        self.count = 0
        self.draining = False
        """Set once: requests with a place may finish; new ones get none."""
        self.idle = asyncio.Event()
        """Set while nothing runs."""
        self.idle.set()
        self._usable = usable
        self._retry_after_s = retry_after_s

    @property
    def unavailable(self) -> Failure | None:
        """Why no request can be served, apart from the bound, or None."""
        if self.draining:
            return self._failure(FailureKind.UNAVAILABLE, "This front proxy is shutting down.")
        if not self._usable():
            text = "No usable worker set: a decode worker must be up and registered."
            return self._failure(FailureKind.UNAVAILABLE, text)
        return None

    def enter(self) -> Place:
        """The place of a new request, which is here as a whole. Raises FailureError, counted as a refusal."""
        self.check()
        return Place(self)

    def check(self) -> None:
        """Raise what ``enter`` would, and take nothing: for a request of which more is to come."""
        if (failure := self.unavailable) is not None:
            REFUSALS.labels("draining" if self.draining else "no_worker").inc()
            raise FailureError(failure)
        self._check_room(1)

    def change(self, by: int) -> None:
        """Only a Place calls this. Raises FailureError, counted as a refusal, when there is no room."""
        if by > 0:
            self._check_room(by)
        self.count += by
        if self.count:
            self.idle.clear()
        else:
            self.idle.set()

    def _check_room(self, by: int) -> None:
        if self.count + by > self.count_max:
            REFUSALS.labels("in_flight").inc()
            text = f"This front proxy already runs {self.count} of at most {self.count_max} sequences."
            raise FailureError(self._failure(FailureKind.EXHAUSTED, f"{text} Please try again later."))

    def _failure(self, kind: FailureKind, message: str) -> Failure:
        return Failure(kind=kind, message=message, retry_after_s=self._retry_after_s)


class Place:
    """One request's share of the count. Its sequences may outlive the request."""

    __slots__ = ("_in_flight", "_least", "_sequences", "_size")

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._least, self._sequences, self._size = 1, 0, 0
        self._resize(0)

    def leave(self) -> None:
        """The request is over."""
        self._least = 0
        self._resize(self._sequences)

    @contextmanager
    def sequences(self, count: int) -> Iterator[None]:
        """Hold ``count`` sequences more. Raises FailureError when they do not fit."""
        if count > self._in_flight.count_max:
            text = f"n must be at most {self._in_flight.count_max}, got {count}."
            raise FailureError(Failure(kind=FailureKind.BAD_REQUEST, message=text))
        self._resize(self._sequences + count)
        try:
            yield
        finally:
            self._resize(self._sequences - count)

    def _resize(self, sequences: int) -> None:
        size = max(sequences, self._least)
        self._in_flight.change(size - self._size)
        self._sequences, self._size = sequences, size
