"""The life of one held hand-off, as a pure machine: events in, actions out. Never frees a block itself.

A lease is offered once, renewed while its KV is wanted, pulled at most once, and ends once. Messages repeat and cross
each other, so every ending is idempotent.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

import msgspec

EVENT_LOG_MAX = 64


class LeaseState(enum.StrEnum):
    """Where a lease stands. The first two hold KV blocks, the last two are final."""

    OFFERED = "offered"
    PULLING = "pulling"
    RELEASED = "released"
    EXPIRED = "expired"


HOLDING = frozenset({LeaseState.OFFERED, LeaseState.PULLING})


class Offered(msgspec.Struct, frozen=True):
    """The engine holds the KV, and the hand-off is about to leave this process."""

    expires_at_s: float


class PullStarted(msgspec.Struct, frozen=True):
    """A decode engine began to read the KV."""


class Renewed(msgspec.Struct, frozen=True):
    """The receiver of the hand-off still waits for the KV. Never shortens a lease."""

    expires_at_s: float


class Pulled(msgspec.Struct, frozen=True):
    """A decode engine has the KV; the transfer layer has freed the blocks on its own."""


class Released(msgspec.Struct, frozen=True):
    """The KV is not needed any more: by message, or because the stream of the offer ended."""


class Tick(msgspec.Struct, frozen=True):
    """Time passed."""

    now_s: float


class HolderGone(msgspec.Struct, frozen=True):
    """The engine that holds the KV is closed or dead. There is nothing left to free."""


LeaseEvent = Offered | PullStarted | Renewed | Pulled | Released | Tick | HolderGone


class FreeBlocks(msgspec.Struct, frozen=True):
    """Tell the engine to give up the KV of this lease. Idempotent."""

    lease_id: str


class Count(msgspec.Struct, frozen=True):
    """Something worth a counter happened."""

    what: str


class KeepBlocks(msgspec.Struct, frozen=True):
    """Tell the engine to hold the KV of this lease for so long from now. Idempotent."""

    lease_id: str
    lease_s: float


LeaseAction = FreeBlocks | KeepBlocks | Count


class Step(msgspec.Struct, frozen=True):
    """One cell of the table: where the lease goes, whether blocks are freed, what is counted."""

    to: LeaseState
    free: bool = False
    count: str = ""


_S = LeaseState

# A pair that is not here is a bug in the caller. A Tick counts only once the lease has run out.
TRANSITIONS: dict[tuple[LeaseState | None, type[LeaseEvent]], Step] = {
    (None, Offered): Step(_S.OFFERED, count="offered"),
    (_S.OFFERED, PullStarted): Step(_S.PULLING),
    (_S.OFFERED, Pulled): Step(_S.RELEASED, count="pulled"),
    (_S.OFFERED, Released): Step(_S.RELEASED, free=True, count="released"),
    (_S.OFFERED, Tick): Step(_S.EXPIRED, free=True, count="expired"),
    (_S.OFFERED, HolderGone): Step(_S.RELEASED, count="holder_gone"),
    (_S.OFFERED, Renewed): Step(_S.OFFERED, count="renewed"),
    (_S.PULLING, Renewed): Step(_S.PULLING, count="renewed"),
    (_S.PULLING, Pulled): Step(_S.RELEASED, count="pulled"),
    (_S.PULLING, Released): Step(_S.RELEASED, free=True, count="released"),
    (_S.PULLING, Tick): Step(_S.EXPIRED, free=True, count="expired"),
    (_S.PULLING, HolderGone): Step(_S.RELEASED, count="holder_gone"),
    (_S.RELEASED, PullStarted): Step(_S.RELEASED, count="pull_too_late"),
    (_S.RELEASED, Renewed): Step(_S.RELEASED, count="renewed_too_late"),
    (_S.RELEASED, Pulled): Step(_S.RELEASED),
    (_S.RELEASED, Released): Step(_S.RELEASED),
    (_S.RELEASED, Tick): Step(_S.RELEASED),
    (_S.RELEASED, HolderGone): Step(_S.RELEASED),
    (_S.EXPIRED, PullStarted): Step(_S.EXPIRED, count="pull_too_late"),
    (_S.EXPIRED, Renewed): Step(_S.EXPIRED, count="renewed_too_late"),
    (_S.EXPIRED, Pulled): Step(_S.EXPIRED),
    (_S.EXPIRED, Released): Step(_S.EXPIRED),
    (_S.EXPIRED, Tick): Step(_S.EXPIRED),
    (_S.EXPIRED, HolderGone): Step(_S.EXPIRED),
}


class IllegalLeaseEvent(Exception):
    """An event that cannot happen in this state; the message tells the lease's event log."""


class Lease:
    """One hand-off's permission to stay in memory."""

    __slots__ = ("_event_log", "expires_at_s", "lease_id", "state")

    def __init__(self, lease_id: str) -> None:
        self.lease_id = lease_id
        self.state: LeaseState | None = None
        self.expires_at_s = 0.0
        self._event_log: deque[str] = deque(maxlen=EVENT_LOG_MAX)

    @property
    def holding(self) -> bool:
        """Whether KV blocks are kept for it."""
        return self.state in HOLDING

    def handle(self, event: LeaseEvent) -> Sequence[LeaseAction]:
        """Advance by one event and say what is to be done."""
        if isinstance(event, Tick) and self.state is not None and event.now_s < self.expires_at_s:
            return ()
        step = TRANSITIONS.get((self.state, type(event)))
        if step is None:
            raise IllegalLeaseEvent(
                f"lease {self.lease_id}: {event!r} cannot happen in {self.state}; log: {' '.join(self._event_log)}"
            )
        if isinstance(event, Offered):
            self.expires_at_s = event.expires_at_s
        if isinstance(event, Renewed):
            self.expires_at_s = max(self.expires_at_s, event.expires_at_s)
        if step.to is not self.state or step.count:
            self._event_log.append(f"{self.state or 'new'}+{type(event).__name__}->{step.to}")
        self.state = step.to
        actions: list[LeaseAction] = []
        if step.free:
            actions.append(FreeBlocks(self.lease_id))
        if step.count:
            actions.append(Count(step.count))
        return actions

    def event_log(self) -> Sequence[str]:
        """What happened to it, oldest first, bounded."""
        return tuple(self._event_log)
