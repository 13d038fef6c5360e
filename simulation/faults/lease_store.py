"""Which of several schedulers leads in virtual time: one record, and production's rules of time for a Lease."""

from __future__ import annotations

from scheduler.leadership.rules import LeaseTerm


class LeaseStore:
    """What all schedulers share. A read and a write behind it happen at one moment, so no version can conflict."""

    def __init__(self) -> None:
        self.epoch = 0
        self.version = 0


class SimLease:
    """One scheduler incarnation's side of it."""

    def __init__(self, store: LeaseStore, lease_s: float) -> None:
        self._store = store
        self._lease_s = lease_s
        self._term = LeaseTerm(lease_s)
        self.epoch = 0
        """Of this leadership; 0: a candidate."""

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed."""
        return self._term.until_s

    def claim(self, now_s: float) -> bool:
        """Whether this one leads from now on."""
        store = self._store
        if store.epoch and not self._term.is_over(store.version, now_s, lease_s=self._lease_s):
            return False
        store.epoch += 1
        self.epoch = store.epoch
        self._write(now_s)
        return True

    def renew(self, now_s: float) -> bool:
        """Whether this one still leads."""
        if self._store.epoch != self.epoch or now_s >= self.until_s:
            return False
        self._write(now_s)
        return True

    def _write(self, now_s: float) -> None:
        self._store.version += 1
        self._term.wrote(now_s)
