"""What the scheduler wants done. Values only; ``service`` does them, and a simulator may."""

from __future__ import annotations

import msgspec

from accounts.account import Standing
from accounts.treasury import HoldAsked
from runtime.failures import Failure
from runtime.roles import WorkerRole
from scheduler.api.explanation import PlanExplained


class Placement(msgspec.Struct, frozen=True, gc=False):
    """One incarnation of one worker, in one role; of a worker with several data-parallel ranks, one of them."""

    worker_id: str
    address: str
    epoch: int
    # Which registration of that incarnation.
    registration: int = 0
    # None: it has one rank, or chooses itself.
    rank: int | None = None

    @property
    def target(self) -> str:
        """Its name among all that is planned for."""
        return self.worker_id if self.rank is None else f"{self.worker_id}#{self.rank}"


class ReplyPlan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tell a front proxy where its request runs."""

    session: int
    plan_id: int
    prefill: Placement | None
    decode: Placement | None
    decode_blocks_reserved: int
    reason: str
    # Time it waited for its place.
    waited_s: float = 0.0
    # As it was asked.
    hold: HoldAsked | None = None
    # Why so. None: nothing is remembered of it.
    explained: PlanExplained | None = None


class ReplyWaiting(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a front proxy that its request waits, at most for so long; a plan or a refusal follows."""

    session: int
    plan_id: int
    wait_max_s: float


class ReplyRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a front proxy why its request runs nowhere. ``cause`` is a short label, one of a closed set."""

    session: int
    plan_id: int
    failure: Failure
    cause: str
    # Both as in ReplyPlan.
    waited_s: float = 0.0
    explained: PlanExplained | None = None
    # How far the rates are used that bound it.
    standing: Standing | None = None


class AcceptWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a worker that it is registered."""

    session: int
    worker_id: str


class RejectWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Refuse a registration; nothing was changed."""

    session: int
    failure: Failure


class DropWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Close the stream of a worker that is no longer a member (silent, or replaced by a newer incarnation)."""

    session: int
    worker_id: str
    reason: str


class DrainWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a worker to take nothing new and finish what it has."""

    session: int
    worker_id: str


class FlipWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a worker to change its role within ``timeout_s``, or to go on in its old one."""

    session: int
    worker_id: str
    role: WorkerRole
    timeout_s: float


class AskBlockSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Ask a worker for all of its blocks: a delta is missing."""

    session: int
    worker_id: str
    rank: int


class ReportLeak(msgspec.Struct, frozen=True, kw_only=True):
    """Tell operators that a worker holds KV for a request that no front proxy runs."""

    worker_id: str
    lease_id: str
    request_id: str
    unknown_for_s: float


class ReportDropped(msgspec.Struct, frozen=True, kw_only=True):
    """Tell operators that a reservation without a request was dropped, and how that was noticed."""

    request_id: str
    reason: str


class EjectWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Tell operators that a worker is left out for a while, since it fails what it is sent."""

    worker_id: str
    for_s: float


class PublishView(msgspec.Struct, frozen=True):
    """Push the cluster to all front proxies: at once, or when the next throttled push is due."""

    at_once: bool


Action = (
    ReplyPlan
    | ReplyWaiting
    | ReplyRefusal
    | AcceptWorker
    | RejectWorker
    | DropWorker
    | DrainWorker
    | FlipWorker
    | AskBlockSnapshot
    | EjectWorker
    | ReportLeak
    | ReportDropped
    | PublishView
)
