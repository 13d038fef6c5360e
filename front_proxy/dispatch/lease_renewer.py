"""Renews the leases of hand-offs that decode workers were given and have not answered. Decides no hand-off.

A pull that is over before the first renewal, as nearly all are, costs no message. The holder bounds the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kv_transfer.handoff.handoff import KvHandoff


class LeaseRenewer:
    """Hand-offs under way, in the order in which their renewals fall due, and one timer for the next."""

    def __init__(self, interval_s: float, renew: Callable[[KvHandoff], bool]) -> None:
        self._interval_s = interval_s
        self._renew = renew
        self._loop = asyncio.get_running_loop()
        # The interval is the same for all, so the order of arrival is the order of falling due.
        self._due_s: dict[KvHandoff, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, handoff: KvHandoff) -> None:
        """A decode worker was given this hand-off: renew it until ``drop``, or until its holder cannot be told."""
        self._due_s.pop(handoff, None)
        self._due_s[handoff] = self._loop.time() + self._interval_s
        self._wind()

    def drop(self, handoff: KvHandoff) -> None:
        """No decode worker waits for it any more. Idempotent."""
        # The timer stays: winding it for every request would cost more than one that finds nothing to do.
        self._due_s.pop(handoff, None)

    def close(self) -> None:
        """Renew nothing more."""
        self._due_s.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wind(self) -> None:
        if self._timer is None and self._due_s:
            self._timer = self._loop.call_at(next(iter(self._due_s.values())), self._ring)

    def _ring(self) -> None:
        self._timer = None
        now_s = self._loop.time()
        for handoff, due_s in tuple(self._due_s.items()):
            if due_s > now_s:
                break
            if self._renew(handoff):
                self.keep(handoff)
            else:
                self.drop(handoff)
        self._wind()
