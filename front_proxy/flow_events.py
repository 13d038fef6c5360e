"""The vocabulary of RequestFlow: what may happen to a request and what may be asked for it. Holds values only."""

from __future__ import annotations

from typing import Literal

import msgspec

from front_proxy.generation import GenerationDelta
from front_proxy.work import Placement, Stage, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure

Outcome = Literal["finished", "failed", "cancelled"]
Resumption = Literal["restart", "continue", "replay"]


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler placed an attempt. ``prefill`` None: the decode worker computes the prompt."""

    attempt: int
    prefill: Placement | None
    decode: Placement | None
    decode_blocks_reserved: int = 0
    reason: str = ""


class PlanRefused(msgspec.Struct, frozen=True, kw_only=True):
    """No placement for this attempt, by the scheduler's word or because it did not answer; nothing is reserved."""

    attempt: int
    failure: Failure


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """A worker produced something for an attempt."""

    attempt: int
    stage: Stage
    output: WorkerOutput


class WorkerFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A worker refused, lost or broke an attempt's work; nothing more follows from it."""

    attempt: int
    stage: Stage
    failure: Failure


class Stalled(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt's work has produced nothing for too long; it may still run."""

    attempt: int
    stage: Stage
    waited_s: float


class HolderLost(msgspec.Struct, frozen=True, kw_only=True):
    """The stream to a worker incarnation is lost; KV that it holds may never arrive."""

    worker_id: str
    epoch: int


class PauseOver(msgspec.Struct, frozen=True, kw_only=True):
    """The pause after an attempt that was not placed is over."""

    attempt: int


class ClientGone(msgspec.Struct, frozen=True, kw_only=True):
    """Nobody waits for this request any more. ``satisfied``: because they have all they wanted (a stop string)."""

    satisfied: bool = False


class DeadlinePassed(msgspec.Struct, frozen=True):
    """The request took as long as it may."""


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """The front proxy itself ends the request: a reader that is too slow, a shutdown."""

    failure: Failure


FlowEvent = (
    Planned
    | PlanRefused
    | Output
    | WorkerFailed
    | Stalled
    | HolderLost
    | PauseOver
    | ClientGone
    | DeadlinePassed
    | Stopped
)


class AskPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Ask the scheduler where this attempt should run. ``shown_tokens`` lengthen its prompt and are not asked for.

    ``tries_again``, here and below: when it is refused for want of room, no client hears of it.
    """

    attempt: int
    shown_tokens: int = 0
    excluded_worker_ids: tuple[str, ...] = ()
    pinned_decode_worker: str | None = None
    prefill_only: bool = False
    tries_again: bool = False


class StartPrefill(msgspec.Struct, frozen=True, kw_only=True):
    """Submit prompt + ``shown`` tokens. ``whole`` uses the full sampling: this one token is the whole output."""

    attempt: int
    worker: Placement
    whole: bool
    shown: tuple[int, ...] = ()
    tries_again: bool = False


class StartDecode(msgspec.Struct, frozen=True, kw_only=True):
    """Submit prompt + ``shown`` tokens; the continuation's sampling is meant when there are shown ones."""

    attempt: int
    worker: Placement
    handoff: KvHandoff | None
    shown: tuple[int, ...]
    blocks_reserved: int
    tries_again: bool = False


class Emit(msgspec.Struct, frozen=True, kw_only=True):
    """Give this to the client. ``stage`` is where its tokens were computed."""

    delta: GenerationDelta
    stage: Stage


class AbortWork(msgspec.Struct, frozen=True, kw_only=True):
    """Stop an attempt's running work on its worker."""

    attempt: int
    stage: Stage
    worker: Placement


class ReleaseHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the holder that its KV is not needed any more. ``pulled``: it arrived where it should."""

    handoff: KvHandoff
    pulled: bool


class EndPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Free what the scheduler reserved for an attempt, which showed so many tokens."""

    attempt: int
    outcome: Outcome
    output_tokens: int


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the scheduler that a worker does not work."""

    worker: Placement
    reason: str


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """Say PauseOver after so long: nobody can take the request now."""

    attempt: int
    wait_s: float


class Retried(msgspec.Struct, frozen=True, kw_only=True):
    """For the counters: an attempt failed and another one follows.

    ``how``: from the start because nothing was shown, behind the shown tokens, or all again with a comparison.
    """

    stage: Stage
    failure: Failure
    how: Resumption


class Diverged(msgspec.Struct, frozen=True, kw_only=True):
    """For the counters: a replay gave other tokens than those that the client has."""

    shown_tokens: int


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The last action of every request. ``failure`` is None when it finished."""

    outcome: Outcome
    failure: Failure | None
    output_tokens: int


FlowAction = (
    AskPlan
    | StartPrefill
    | StartDecode
    | Emit
    | AbortWork
    | ReleaseHandoff
    | EndPlan
    | Suspect
    | Pause
    | Retried
    | Diverged
    | Finish
)
