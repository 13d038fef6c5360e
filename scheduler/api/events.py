"""What can happen to the scheduler. Values only; ``core`` says what follows from each.

``session`` numbers one stream of a worker or a front proxy. The caller never reuses a number, so news of a stream that
was replaced can be told from news of its successor.
"""

from __future__ import annotations

import msgspec

from accounts.treasury import HoldAsked
from kv_transfer.prefix.events import BlockDelta
from runtime.roles import WorkerRole
from scheduler.api.actions import Placement
from scheduler.api.worker_info import WorkerInfo, WorkerLoad
from scheduler.api.worker_progress import EngineStep


class WorkerJoined(msgspec.Struct, frozen=True, kw_only=True):
    """A worker registered on its stream."""

    session: int
    info: WorkerInfo


class WorkerLoadReported(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A worker said what it is doing; also its heartbeat."""

    session: int
    worker_id: str
    load: WorkerLoad


class WorkerLeasesReported(msgspec.Struct, frozen=True, kw_only=True):
    """A worker named the leases it has held longest, oldest first."""

    session: int
    worker_id: str
    lease_ids: tuple[str, ...]


class WorkerBlocksReported(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A worker said which blocks of its engine came or went."""

    session: int
    worker_id: str
    delta: BlockDelta


class WorkerProgressReported(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A worker said how long steps of its engine took. Comes before its next load."""

    session: int
    worker_id: str
    steps: tuple[EngineStep, ...] = ()


class WorkerLeft(msgspec.Struct, frozen=True, kw_only=True):
    """A worker said goodbye or its stream ended."""

    session: int
    worker_id: str
    reason: str


class WorkerSuspected(msgspec.Struct, frozen=True, kw_only=True):
    """A front proxy could not use this incarnation of a worker.

    Its stream broke, its work stalled, or a request that failed in its engine then succeeded elsewhere.
    """

    worker_id: str
    epoch: int
    reason: str


class DrainRequested(msgspec.Struct, frozen=True, kw_only=True):
    """An operator wants this worker to drain."""

    worker_id: str


class FlipRequested(msgspec.Struct, frozen=True, kw_only=True):
    """An operator or the planner wants this worker in another role. Not done if ``SchedulerCore.flips`` objects."""

    worker_id: str
    role: WorkerRole


class FrontJoined(msgspec.Struct, frozen=True, kw_only=True):
    """A front proxy opened its stream. ``incarnation``: which process of that id; 0: it does not say."""

    session: int
    front_proxy_id: str
    incarnation: int = 0


class FrontLeft(msgspec.Struct, frozen=True, kw_only=True):
    """A front proxy's stream ended: its plans are ended by nothing else."""

    session: int


class PlanRequested(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A request asks where to run."""

    session: int
    plan_id: int
    request_id: str
    prompt_tokens: int
    output_tokens_max: int
    priority: int = 0
    excluded_worker_ids: frozenset[str] = frozenset()
    pinned_decode_worker_id: str | None = None
    # Requests of one tenant wait for one another; tenants share.
    tenant: str = ""
    # "interactive", "default" or "batch"; anything else: by ``priority``.
    priority_class: str = ""
    # Longest wait the request itself allows. 0: its class's.
    wait_max_s: float = 0.0
    prefill_only: bool = False
    # An earlier attempt of it failed on a worker: it waits ahead of new requests of its class, for a usable worker too.
    resumed: bool = False
    # Packed keys of the prompt's full blocks (``kv_transfer.prefix.block_keys``). Empty: not known.
    block_keys: bytes = b""
    # What its client asks for. 0: nothing.
    ttft_slo_s: float = 0.0
    itl_slo_s: float = 0.0
    # What it is to hold of its budget. None: nothing is counted.
    hold: HoldAsked | None = None


class RunningPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A plan as the front proxy that runs it tells it. ``decode_blocks`` is what it reserves there."""

    plan_id: int
    request_id: str
    prefill: Placement | None
    decode: Placement | None
    decode_blocks: int


class PlansRunning(msgspec.Struct, frozen=True, kw_only=True):
    """A front proxy says what it runs. ``complete``: its plans named neither here nor as asked are over."""

    session: int
    plans: tuple[RunningPlan, ...]
    asked: frozenset[int] = frozenset()
    complete: bool = False


class RequestEnded(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A planned request is over, however it went. Idempotent. All of it is of this plan alone."""

    session: int
    plan_id: int
    # "finished", "failed" or "cancelled"; only a finish says something about the workers.
    outcome: str = ""
    # Shown to the client under this plan.
    output_tokens: int = 0
    # From the question to the first token that the client got. 0: it got none.
    ttft_s: float = 0.0
    # (Last - first token) / (tokens - 1), of a finished one. 0: not known.
    itl_s: float = 0.0
    # Of the prompt, that the worker which computed it found.
    cached_tokens: int = 0
    # Why generation ended ("stop", "length"), or the kind of failure.
    finish: str = ""


class Tick(msgspec.Struct, frozen=True):
    """Time passed. ``late_s``: for so long this process stood still before it."""

    late_s: float = 0.0


Event = (
    WorkerJoined
    | WorkerLoadReported
    | WorkerLeasesReported
    | WorkerBlocksReported
    | WorkerProgressReported
    | WorkerLeft
    | WorkerSuspected
    | DrainRequested
    | FlipRequested
    | FrontJoined
    | FrontLeft
    | PlanRequested
    | PlansRunning
    | RequestEnded
    | Tick
)
