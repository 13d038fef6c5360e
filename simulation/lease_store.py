"""The lease of several schedulers in virtual time: production's rules of time over a store that is one row.

As with files, the store knows that a holder is dead.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.leadership import Holder, Tenure, Watch, next_epoch
from simulation.world import World


class LeaseStore:
    """What all schedulers share."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.holder = Holder()
        self.renewals = 0
        self.locked: SimLease | None = None
        """Whose lock it is; a process that dies loses it."""
        self.asked = 0
        """How often one that stands by was asked."""


class SimLease:
    """One scheduler incarnation's seat: ``LeaderLease`` without waiting, since in virtual time nothing does."""

    def __init__(self, store: LeaseStore, lease_s: float) -> None:
        self._store = store
        self._now_s: Callable[[], float] = lambda: store.world.now_s
        self._tenure = Tenure(lease_s)
        self._watch = Watch(lease_s)
        self._asked = store.asked
        self.leader = Holder()
        """Who led, as ``try_acquire`` last saw it."""

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed."""
        return self._tenure.until_s

    @property
    def sees_leader(self) -> bool:
        """Whether another one was lately seen to renew."""
        return self._watch.sees_leader(self._now_s())

    def try_acquire(self, address: str) -> int | None:
        """The epoch of a leadership that begins now; None while another one leads."""
        store, now_s = self._store, self._now_s()
        self.leader = store.holder
        if store.locked is not None and self._watch.leads((store.holder.epoch, store.renewals), now_s, now_s):
            return None
        epoch = next_epoch(store.holder.epoch, 0)
        store.holder, store.locked = Holder(epoch, address), self
        return epoch if self._tenure.begin(now_s, now_s) else None

    def renew(self) -> bool:
        """Whether leading goes on."""
        store, now_s = self._store, self._now_s()
        if not self._tenure.renewable(now_s) or store.locked is not self:
            return False
        store.renewals += 1
        return self._tenure.renew(now_s, now_s)

    def tell_asked(self) -> None:
        """Somebody asks here."""
        self._store.asked += 1

    def other_asked(self) -> bool:
        """Whether somebody has asked one that stands by since this was last called."""
        before, self._asked = self._asked, self._store.asked
        return self._asked != before

    def release(self) -> None:
        """Lead no longer; what a process's death does too."""
        self._tenure.end()
        if self._store.locked is self:
            self._store.locked = None
