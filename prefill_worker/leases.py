"""Every lease this worker holds, by id. Drives the lease machines; frees nothing and asks no clock."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from kv_transfer.handoff.lease import (
    Count,
    HolderGone,
    KeepBlocks,
    Lease,
    LeaseAction,
    LeaseEvent,
    LeaseState,
    Offered,
    Pulled,
    PullStarted,
    Released,
    Renewed,
    Tick,
)

EVENT_LOG_MAX = 64


class Held(msgspec.Struct, frozen=True):
    """One lease: the stream of its offer, its start, and its blocks."""

    lease: Lease
    owner: int
    blocks: int
    since_s: float


class LeaseTable:
    """Leases that hold KV. An ended lease is forgotten, so later messages about it change nothing."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._blocks = 0
        self._event_log: deque[str] = deque(maxlen=EVENT_LOG_MAX)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def blocks(self) -> int:
        """KV blocks of all leases held."""
        return self._blocks

    def event_log(self) -> Sequence[str]:
        """How the latest leases went, oldest first, bounded."""
        return tuple(self._event_log)

    def oldest(self, count: int) -> Sequence[str]:
        """Ids of up to ``count`` leases held longest, the oldest first: a leak is among them."""
        # Offered in the order of time, and a dict keeps it.
        return list(itertools.islice(self._held, count))

    def offer(
        self, lease_id: str, *, owner: int, blocks: int, now_s: float, expires_at_s: float
    ) -> Sequence[LeaseAction]:
        """A new lease. An id that is held already is a bug of the engine."""
        assert lease_id not in self._held, f"lease {lease_id} is offered twice; log: {' '.join(self._event_log)}"
        lease = Lease(lease_id)
        actions = lease.handle(Offered(expires_at_s))
        self._held[lease_id] = Held(lease, owner, blocks, now_s)
        self._blocks += blocks
        self._event_log.append(f"{lease_id}:offered")
        return actions

    def pull_started(self, lease_id: str) -> Sequence[LeaseAction]:
        """A decode engine began to read. A read that comes too late is only counted."""
        held = self._held.get(lease_id)
        if held is None:
            return (Count("pull_too_late"),)
        return self._tell(held, PullStarted()) if held.lease.state is LeaseState.OFFERED else ()

    def renew(self, lease_id: str, *, now_s: float, lease_s: float, total_max_s: float) -> Sequence[LeaseAction]:
        """The receiver of the hand-off still waits for the KV. Bounded by ``total_max_s`` since the offer."""
        held = self._held.get(lease_id)
        if held is None or held.lease.expires_at_s <= now_s:
            return (Count("renewed_too_late"),)
        started = self.pull_started(lease_id)
        until_s = min(now_s + lease_s, held.since_s + total_max_s)
        if until_s <= held.lease.expires_at_s:
            return [*started, Count("renewals_used_up")] if until_s < now_s + lease_s else started
        return [*started, *self._tell(held, Renewed(until_s)), KeepBlocks(lease_id, until_s - now_s)]

    def pulled(self, lease_id: str) -> Sequence[LeaseAction]:
        """A decode engine has the KV. Unknown leases are ignored."""
        held = self._held.get(lease_id)
        return () if held is None else self._tell(held, Pulled())

    def release(self, lease_id: str) -> Sequence[LeaseAction]:
        """The KV is not needed any more. Unknown leases are ignored."""
        held = self._held.get(lease_id)
        return () if held is None else self._tell(held, Released())

    def owner_gone(self, owner: int) -> Sequence[LeaseAction]:
        """Release what was offered on one stream."""
        return self._tell_all(Released(), lambda held: held.owner == owner)

    def tick(self, now_s: float) -> Sequence[LeaseAction]:
        """Expire what ran out."""
        return self._tell_all(Tick(now_s), lambda held: held.lease.expires_at_s <= now_s)

    def holder_gone(self) -> Sequence[LeaseAction]:
        """The engine and all KV with it are gone."""
        return self._tell_all(HolderGone(), lambda _: True)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        assert all(held.lease.holding for held in self._held.values()), self.event_log()
        assert self._blocks == sum(held.blocks for held in self._held.values()), self.event_log()

    def _tell_all(self, event: LeaseEvent, concerns: Callable[[Held], bool]) -> Sequence[LeaseAction]:
        actions: list[LeaseAction] = []
        for held in [held for held in self._held.values() if concerns(held)]:
            actions.extend(self._tell(held, event))
        return actions

    def _tell(self, held: Held, event: LeaseEvent) -> Sequence[LeaseAction]:
        actions = held.lease.handle(event)
        if not held.lease.holding:
            del self._held[held.lease.lease_id]
            self._blocks -= held.blocks
        self._event_log.append(f"{held.lease.lease_id}:{type(event).__name__}->{held.lease.state}")
        return actions
