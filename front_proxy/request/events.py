"""The vocabulary of RequestFlow: what may happen to a request and what may be asked for it. Holds values only."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from front_proxy.request.generation import GenerationDelta
from front_proxy.request.work import Stage, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure
from scheduler.api.actions import Placement
from scheduler.api.events import RunningPlan

Outcome = Literal["finished", "failed", "cancelled"]
Resumption = Literal["restart", "continue", "replay"]


class Measured(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a plan's end says of it beside its outcome; ``scheduler.api.events.RequestEnded`` says what each is."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    cached_tokens: int = 0
    finish: str = ""


class RequestPhase(enum.Enum):
    """Where a request stands."""

    NEW = "new"
    PLANNING = "planning"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    """Submitted to the decode worker, which has not produced anything yet."""
    DECODING = "decoding"
    DONE = "done"


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler placed an attempt. No prefill worker in ``plan``: the decode worker computes the prompt."""

    attempt: int
    plan: RunningPlan


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


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """The request ends for a reason outside its workers: its client left, it took too long, the front proxy stops.

    ``failure`` None: the client has all that it wanted (a stop string).
    """

    failure: Failure | None


FlowEvent = Planned | PlanRefused | Output | WorkerFailed | Stalled | HolderLost | Stopped


def title(event: FlowEvent) -> str:
    """The event for logs and error messages. Never tells what a token was."""
    if not isinstance(event, Output):
        return str(event)
    output = event.output
    lease = output.handoff and output.handoff.lease_id
    facts = f"{len(output.token_ids)} tokens finish={output.finish and output.finish.reason} lease={lease}"
    return f"{event.stage.value}/{event.attempt} {facts}"


class AskPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Ask the scheduler where this attempt should run. ``resume_token_ids`` lengthen its prompt and are not asked for.

    ``resumed``: an earlier attempt of this request failed on a worker. It waits ahead of new requests of its class.
    """

    attempt: int
    resume_token_ids: tuple[int, ...] = ()
    excluded_worker_ids: tuple[str, ...] = ()
    pinned_decode_worker: str | None = None
    prefill_only: bool = False
    resumed: bool = False


class StartPrefill(msgspec.Struct, frozen=True, kw_only=True):
    """Submit prompt + ``resume_token_ids``. ``whole`` uses the full sampling: this one token is the whole output."""

    attempt: int
    worker: Placement
    whole: bool
    resume_token_ids: tuple[int, ...] = ()


class StartDecode(msgspec.Struct, frozen=True, kw_only=True):
    """Submit prompt + ``resume_token_ids``; the continuation's sampling is meant when there are some."""

    attempt: int
    worker: Placement
    handoff: KvHandoff | None
    resume_token_ids: tuple[int, ...]
    blocks_reserved: int


class Emit(msgspec.Struct, frozen=True, kw_only=True):
    """Give this to the client."""

    delta: GenerationDelta


class AbortWork(msgspec.Struct, frozen=True, kw_only=True):
    """Stop an attempt's running work on its worker."""

    attempt: int
    stage: Stage


class ReleaseHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the holder that its KV is not needed any more. ``pulled``: it arrived where it should."""

    handoff: KvHandoff
    pulled: bool


class EndPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Free what the scheduler reserved for an attempt, which showed so many tokens.

    ``finish``: why generation ended ("stop", "length"), or the kind of failure.
    """

    attempt: int
    outcome: Outcome
    output_tokens: int
    finish: str


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the scheduler that a worker failed a request which then went on elsewhere."""

    worker: Placement
    reason: str


class Retried(msgspec.Struct, frozen=True, kw_only=True):
    """For the counters: an attempt failed and another one follows.

    ``how``: from the start because nothing was delivered, behind the delivered tokens, or all again with a comparison.
    ``counted``: it used up one of the request's tries; else no worker took it.
    """

    stage: Stage
    failure: Failure
    how: Resumption
    counted: bool = True


class Diverged(msgspec.Struct, frozen=True, kw_only=True):
    """For the counters: a replay gave other tokens than those that the client has."""

    delivered_tokens: int


class FinishRequest(msgspec.Struct, frozen=True, kw_only=True):
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
    | Retried
    | Diverged
    | FinishRequest
)
