"""The store of the leader's lease in virtual time: one record, and production's rules of time (``LeaseTerm``)."""

from __future__ import annotations

import asyncio

from scheduler.leadership.rules import LOOKS_PER_TERM, LeaseTerm, next_epoch


class LeaseStore:
    """The record that all schedulers share. A read and the write behind it happen at one moment and never conflict."""

    def __init__(self) -> None:
        self.epoch = 0
        self.version = 0


class SimLease:
    """One scheduler's claim to lead: ``scheduler.leadership.rules.Leadership`` over a ``LeaseStore``."""

    def __init__(self, store: LeaseStore, lease_s: float) -> None:
        self._store = store
        self._lease_s = lease_s
        self._term = LeaseTerm(lease_s)
        self._epoch = 0
        self._now_s = asyncio.get_running_loop().time

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed."""
        return self._term.until_s

    async def acquire(self) -> int:
        """Wait until the record is free or its term is over."""
        store = self._store
        while store.epoch and not self._term.is_over(store.version, self._now_s(), lease_s=self._lease_s):
            await self._pause()
        self._epoch = store.epoch = next_epoch(store.epoch, 0)
        self._write()
        return self._epoch

    async def lost(self) -> str:
        """Renew until another scheduler leads or the term is over."""
        while True:
            await self._pause()
            if self._store.epoch != self._epoch or self._now_s() >= self.until_s:
                return "another scheduler leads"
            self._write()

    async def release(self) -> None:
        """Lead no longer."""
        self._term.end()

    async def _pause(self) -> None:
        await asyncio.sleep(self._lease_s / LOOKS_PER_TERM)

    def _write(self) -> None:
        self._store.version += 1
        self._term.wrote(self._now_s())
