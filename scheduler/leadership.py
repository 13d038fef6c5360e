"""Which of several schedulers leads: the rules of time, and the seat of any store that can promise one holder. Pure.

A leader leads until a moment that it moves on by renewing, and never beyond: one that stood still finds it past when it
wakes. A stand-by takes over once the store says that nobody leads, or once it has not seen a renewal for as long as one
holds. Nobody compares clocks: each counts from what it did or saw itself, the leader from before it renewed and the
stand-by from after it saw that, so the leader's time is over first.

That holds wherever either is held up. A stand-by that takes over looked after the leader's time was over, so what it
has not seen was written later still; and a renewal counts only if it was written before the time it prolongs was over.
``Tenure`` is the leader's side of it and ``Watch`` the stand-by's, for every store: a store only reads and writes.

A leader that is cut off from everybody but the store would renew for ever. ``Reachability`` says when it makes way.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import msgspec

from runtime.silence import LOOKS


class Holder(msgspec.Struct, frozen=True):
    """Who leads, as it wrote down when it began. The epoch of every leader is larger than that of the one before."""

    epoch: int = 0
    address: str = ""


class LeaderLease(Protocol):
    """At most one process leads at any time. OSError says that the store is away, and nothing about who leads.

    Nothing blocks the event loop, and one call is made at a time. A call may be given up by cancelling it: then it is
    not known what it did, as after OSError.
    """

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed, by the holder's clock; in the past where it does not lead.

        It moves on only when a renewal is known to be written: who leads must stop then though one is under way.
        """
        ...

    async def try_acquire(self, address: str) -> int | None:
        """Become the leader, reachable at ``address``: its epoch. None while another one leads."""
        ...

    async def renew(self) -> bool:
        """Move ``until_s`` on. False: lost, and whoever asks must stop leading at once."""
        ...

    @property
    def leader(self) -> Holder:
        """The last one that led, as ``try_acquire`` last saw it."""
        ...

    @property
    def sees_leader(self) -> bool:
        """Whether ``try_acquire`` lately saw another one renew: it leads for sure, whoever else does not hear it."""
        ...

    async def tell_asked(self) -> None:
        """Let the leader know that somebody asks this one, who stands by."""
        ...

    async def other_asked(self) -> bool:
        """Whether somebody who stands by has told that since the last look at it."""
        ...

    async def release(self) -> None:
        """Stop leading, and let others know where the store can be reached. Idempotent."""
        ...


def next_epoch(former: int, wall_ms: int) -> int:
    """The epoch of who follows ``former``. By the clock too, so that it grows also where the last epoch was deleted."""
    return max(former + 1, wall_ms)


class Tenure:
    """The leader's side: until when it leads. Times are of one clock that never goes back."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self.until_s = float("-inf")
        """When leading is over; in the past where it does not lead."""

    def begin(self, began_s: float, written_s: float) -> bool:
        """Lead by a claim that was begun and known to be written at these times. False: its time is over already."""
        if written_s >= began_s + self._lease_s:
            return False
        self.until_s = began_s + self._lease_s
        return True

    def renewable(self, now_s: float) -> bool:
        """Whether it is still time to renew. Who wakes too late does not: somebody may be about to take over."""
        return now_s < self.until_s

    def renew(self, began_s: float, written_s: float) -> bool:
        """Count a renewal, begun and known to be written at these times. False: too late, and leading is over.

        Whoever looked before it was written may have found our time over, and have yet to make its claim.
        """
        if written_s >= self.until_s:
            return False
        self.until_s = began_s + self._lease_s
        return True

    def end(self) -> None:
        """Lead no longer."""
        self.until_s = float("-inf")


class Watch:
    """The stand-by's side: since when the leader is not seen to renew."""

    def __init__(self, lease_s: float) -> None:
        # The longest that any renewal is known to hold.
        self._holds_s = self._lease_s = lease_s
        # What was seen of the last renewal, since when it is known, and whether it is one.
        self._seen: Hashable = None
        self._seen_s = float("-inf")
        self._is_renewal = False

    @property
    def holds_s(self) -> float:
        """The longest time that any renewal seen, or one of ours, holds."""
        return self._holds_s

    def leads(self, seen: Hashable, looked_s: float, seen_s: float, *, lease_s: float = 0.0) -> bool:
        """Whether the leader may still lead, by a look that was begun and done at these times.

        ``seen`` differs with every renewal. ``lease_s``: what the leader says that a renewal holds, if that is longer.
        """
        self._is_renewal = True
        return self._may_lead(("renewal", seen), looked_s, seen_s, lease_s)

    def may_lead_unseen(self, seen: Hashable, looked_s: float, seen_s: float, *, lease_s: float = 0.0) -> bool:
        """Whether somebody may lead where the store, by such a look, tells of nobody who ever led.

        A record that was deleted may have been renewed until just then, and its leader does not know yet. ``seen``
        differs wherever what now stands in its place may be another one.
        """
        self._is_renewal = False
        return self._may_lead(("nobody", seen), looked_s, seen_s, lease_s)

    def sees_leader(self, now_s: float) -> bool:
        """Whether a renewal was seen within half of the time that one holds: who stands still is not named."""
        return self._is_renewal and now_s < self._seen_s + self._lease_s / 2

    def _may_lead(self, seen: Hashable, looked_s: float, seen_s: float, lease_s: float) -> bool:
        if seen != self._seen:
            # It may have been renewed until just now: nothing earlier may be the moment to count from.
            self._seen, self._seen_s = seen, seen_s
        self._holds_s = max(self._holds_s, lease_s)
        # What was renewed after the look began may have been missed: nothing later may be the moment to judge for.
        return looked_s < self._seen_s + self._holds_s


class Reachability:
    """Whether a leader makes way, because nobody reaches it and somebody asks the one that stands by.

    Looked at in equal intervals: a process that stood still itself looks late but not often. Without one that is asked
    the leader stays: then nobody is there, or nobody reaches anybody, and leading elsewhere would help no one. Asked
    once, or before nobody was heard, is not enough: whoever tries the other address first comes here next.
    """

    def __init__(self) -> None:
        self._silent_looks = 0
        self._asked_looks = 0

    def look(self, *, hears: bool, other_asked: bool) -> bool:
        """Whether to make way; what was heard, and asked of the other one, since the last look."""
        if hears:
            self._silent_looks = self._asked_looks = 0
            return False
        self._silent_looks += 1
        if other_asked and self._silent_looks > 1:
            self._asked_looks += 1
        return self._silent_looks > LOOKS and self._asked_looks > 1


class StandbyDemand:
    """For how long somebody has been asking a scheduler that stands by, who leaves pauses of up to ``pause_max_s``."""

    def __init__(self, pause_max_s: float) -> None:
        self._pause_max_s = pause_max_s
        self.count = 0
        """How often so far."""
        self._since_s = self._last_s = float("-inf")

    def note(self, now_s: float) -> None:
        """Somebody asked."""
        if now_s > self._last_s + self._pause_max_s:
            self._since_s = now_s
        self._last_s = now_s
        self.count += 1

    def for_s(self, now_s: float) -> float:
        """Time since the first of those who still ask; 0 where nobody does."""
        return now_s - self._since_s if now_s <= self._last_s + self._pause_max_s else 0.0
