"""Why a request or an attempt ends, and in which words its client hears it. Pure functions; decides no next step."""

from __future__ import annotations

from front_proxy.request.events import Outcome
from front_proxy.request.work import WorkerOutput, broken_by
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement

PLANLESS = Failure(kind=FailureKind.INTERNAL, message="The scheduler's plan names no decode worker.")
# Another worker would say the same to these, so they are not tried again.
FINAL_KINDS = frozenset(
    {
        FailureKind.BAD_REQUEST,
        FailureKind.NOT_FOUND,
        FailureKind.TOO_LARGE,
        FailureKind.DEADLINE,
        FailureKind.UNSUPPORTED,
    }
)


NOT_BOOKED = Failure(
    kind=FailureKind.UNAVAILABLE,
    message="Usage cannot be counted at present: no scheduler answers (accounts.when_away).",
    retry_after_s=1.0,
)
CLIENT_LEFT = Failure(kind=FailureKind.CANCELLED, message="The client went away.")
DEADLINE_PASSED = Failure(kind=FailureKind.DEADLINE, message="The request's deadline passed.")


def outcome(failure: Failure | None) -> Outcome:
    """What an end from outside counts as."""
    if failure is None:
        return "finished"
    return "cancelled" if failure.kind is FailureKind.CANCELLED else "failed"


def broken_prefill(output: WorkerOutput) -> Failure | None:
    """What is wrong with the output of a prefill, if anything is."""
    broken = broken_by(output.finish)
    if broken is not None or output.finish is None or len(output.token_ids) == 1:
        return broken
    if not output.token_ids and output.handoff is not None:
        # An engine with a back-off (WorkerInfo.prefill_backoff_tokens) reports no token.
        return None
    return Failure(kind=FailureKind.INTERNAL, message="A prefill must sample exactly one token.")


def stalled(worker: Placement, waited_s: float) -> Failure:
    """Work that may still run and shows nothing."""
    text = f"Worker {worker.worker_id} has produced nothing for {waited_s:.1f} s."
    return Failure(kind=FailureKind.UNAVAILABLE, message=text)


def told(worker: Placement, failure: Failure, delivered_tokens: int) -> Failure:
    """What the client hears. After its first token: that a worker failed, unless the request itself is the cause."""
    if not delivered_tokens or failure.kind in (FailureKind.BAD_REQUEST, FailureKind.DEADLINE):
        return failure
    text = f"Worker {worker.worker_id} failed after {delivered_tokens} tokens: {failure.message}"
    return Failure(kind=FailureKind.UNAVAILABLE, message=text)


def diverged(delivered_tokens: int) -> Failure:
    """A replay contradicts what the client has."""
    text = f"A worker failed after {delivered_tokens} tokens, and computing them again gave other ones."
    return Failure(kind=FailureKind.INTERNAL, message=text)
