"""Which of several schedulers leads: the interface of the stores, and the rules of time of a lease. Pure.

At most one scheduler leads at any time. Every leadership has an epoch, which is larger than every epoch before it. The
store keeps the last epoch, and a new leader writes its own durably before it decides anything. So an epoch fences: what
an older leader still says or writes is refused by its epoch.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

LOOKS_PER_TERM = 5
"""How often a lease is renewed or looked at in its term. One call may hang for a fifth of it; the next is in time."""


class Leadership(Protocol):
    """One process's claim to lead. Single use: acquire, lost, release, in this order."""

    @property
    def until_s(self) -> float:
        """When this process must stop deciding unless it renews, by its monotonic clock. In the past: not leading."""
        ...

    async def acquire(self) -> int:
        """Wait until this process leads; its epoch. A store that cannot be reached is logged and tried again."""
        ...

    async def lost(self) -> str:
        """Keep the leadership until it is over; returns why."""
        ...

    async def release(self) -> None:
        """Stop leading, so that the next one can begin. Idempotent."""
        ...


def next_epoch(former: int, wall_clock_ms: int) -> int:
    """An epoch above ``former``. The clock makes it grow also where what the store kept was deleted."""
    return max(former + 1, wall_clock_ms)


class LeaseTerm:
    """When a lease is over, for its leader and for a candidate.

    Clocks are not compared. The leader counts from before it wrote a renewal. A candidate counts from after it saw the
    last change. The candidate saw the change after it was written, so the leader's time is always over first. A
    candidate's write names the version that it saw and fails where the leader renewed meanwhile.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: Hashable = None
        self._seen_s = float("-inf")
        self.until_s = float("-inf")
        """When leading is over; in the past for a candidate."""

    def wrote(self, began_s: float) -> None:
        """A write in our name, begun at this time, is known to be done."""
        self.until_s = began_s + self._lease_s

    def end(self) -> None:
        """Lead no longer."""
        self.until_s = float("-inf")

    def is_over(self, version: Hashable, seen_s: float, *, lease_s: float) -> bool:
        """Whether a candidate may take over a record of this version. ``lease_s``: what the record says of its term."""
        if version != self._seen:
            self._seen, self._seen_s = version, seen_s
        return seen_s >= self._seen_s + max(self._lease_s, lease_s)
