"""Seats at one leader's lease, whichever the store: the test's time, and calls that come to their end at once."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from scheduler.leadership import Holder, LeaderLease

LEASE_S = 3.0
T = TypeVar("T")


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s


def finish(call: Coroutine[Any, Any, T]) -> T:
    """The result of a call that waits for nobody."""
    try:
        call.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits for somebody")


class Seat:
    """One contender, without ``await``, so that threads can take turns at every step."""

    def __init__(self, lease: LeaderLease) -> None:
        self.lease = lease

    @property
    def until_s(self) -> float:
        return self.lease.until_s

    @property
    def sees_leader(self) -> bool:
        return self.lease.sees_leader

    @property
    def leader(self) -> Holder:
        return self.lease.leader

    def try_acquire(self, address: str) -> int | None:
        return finish(self.lease.try_acquire(address))

    def renew(self) -> bool:
        return finish(self.lease.renew())

    def release(self) -> None:
        finish(self.lease.release())
