"""Every lease this worker holds, by id. Pure: says what to free and to keep, frees nothing and asks no clock.

A lease is offered once, renewed while its KV is wanted, and ends once: pulled, released by message, or run out.
Messages repeat and cross each other. An ended lease is forgotten, so later ones about it change nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec


class FreeBlocks(msgspec.Struct, frozen=True):
    """Tell the engine to give up the KV of this lease. Idempotent."""

    lease_id: str


class KeepBlocks(msgspec.Struct, frozen=True):
    """Tell the engine to hold the KV of this lease for so long from now. Idempotent."""

    lease_id: str
    lease_s: float


class Count(msgspec.Struct, frozen=True):
    """Something worth a counter happened."""

    what: str


LeaseAction = FreeBlocks | KeepBlocks | Count


class Lease(msgspec.Struct):
    """One held hand-off: its front proxy's stream (``owner``), its KV blocks, its offer and its expiry."""

    owner: int
    blocks: int
    since_s: float
    expires_at_s: float


class LeaseTable:
    """The leases that hold KV."""

    def __init__(self) -> None:
        self._held: dict[str, Lease] = {}
        self.blocks = 0
        """KV blocks of all leases held."""

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    def oldest(self, count: int) -> Sequence[str]:
        """Ids of up to ``count`` leases held longest, the oldest first: a leak is among them."""
        # Leases are added in the order of their offers, and a dict keeps that order.
        return list(itertools.islice(self._held, count))

    def offer(
        self, lease_id: str, *, owner: int, blocks: int, now_s: float, expires_at_s: float
    ) -> Sequence[LeaseAction]:
        """A new lease. An id that is held already is a bug of the engine."""
        assert lease_id not in self._held, f"lease {lease_id} is offered twice"
        self._held[lease_id] = Lease(owner, blocks, now_s, expires_at_s)
        self.blocks += blocks
        return (Count("offered"),)

    def renew(self, lease_id: str, *, now_s: float, lease_s: float, total_max_s: float) -> Sequence[LeaseAction]:
        """The receiver of the hand-off still waits for the KV. Bounded by ``total_max_s`` since the offer."""
        held = self._held.get(lease_id)
        if held is None or held.expires_at_s <= now_s:
            return (Count("renewed_too_late"),)
        until_s = min(now_s + lease_s, held.since_s + total_max_s)
        if until_s <= held.expires_at_s:
            return (Count("renewals_used_up"),) if until_s < now_s + lease_s else ()
        held.expires_at_s = until_s
        return (Count("renewed"), KeepBlocks(lease_id, until_s - now_s))

    def pulled(self, lease_id: str) -> Sequence[LeaseAction]:
        """A decode engine has the KV. The transfer layer has freed the blocks on its own."""
        return self._end(lease_id, "pulled", free=False)

    def release(self, lease_id: str) -> Sequence[LeaseAction]:
        """The KV is not needed any more."""
        return self._end(lease_id, "released")

    def owner_gone(self, owner: int) -> Sequence[LeaseAction]:
        """Release what was offered on one stream."""
        return self._end_all("released", lambda held: held.owner == owner)

    def tick(self, now_s: float) -> Sequence[LeaseAction]:
        """Expire what ran out."""
        return self._end_all("expired", lambda held: held.expires_at_s <= now_s)

    def holder_gone(self) -> Sequence[LeaseAction]:
        """The engine and all KV with it are gone: nothing is left to free."""
        return self._end_all("holder_gone", lambda _: True, free=False)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        assert self.blocks == sum(held.blocks for held in self._held.values()), self._held

    def _end_all(self, why: str, concerns: Callable[[Lease], bool], *, free: bool = True) -> Sequence[LeaseAction]:
        ended = [lease_id for lease_id, held in self._held.items() if concerns(held)]
        return [action for lease_id in ended for action in self._end(lease_id, why, free=free)]

    def _end(self, lease_id: str, why: str, *, free: bool = True) -> Sequence[LeaseAction]:
        """Forget the lease. One that is not held has ended or was never here: nothing is done."""
        held = self._held.pop(lease_id, None)
        if held is None:
            return ()
        self.blocks -= held.blocks
        return (FreeBlocks(lease_id), Count(why)) if free else (Count(why),)
