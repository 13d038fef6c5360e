"""How a request that gets no place is told: the kind of failure, the words, and when to come back."""

from __future__ import annotations

from runtime.failures import Failure, FailureKind
from scheduler.actions import ReplyRefusal
from scheduler.admission import Admission
from scheduler.events import PlanRequested
from scheduler.placement import Cause, NotPlaced
from scheduler.waiting_line import Turned

# What passes when requests end, so that waiting for it makes sense.
PASSING: frozenset[Cause] = frozenset(
    {"plans_in_flight", "no_headroom", "decode_slots", "prefill_slots", "prefill_backlog"}
)
_FINAL: dict[Cause, FailureKind] = {
    "no_worker": FailureKind.UNAVAILABLE,
    "too_large": FailureKind.BAD_REQUEST,
    "plan_id_in_use": FailureKind.BAD_REQUEST,
}


def refusal(
    event: PlanRequested, verdict: NotPlaced, admission: Admission, now_s: float, *, wait_s: float | None = None
) -> ReplyRefusal:
    """The answer to a request. ``wait_s``: when to come back, where a line knows."""
    kind = _FINAL.get(verdict.cause, FailureKind.EXHAUSTED)
    retry_after_s = None
    if kind is FailureKind.EXHAUSTED and wait_s:
        retry_after_s = max(admission.retry_after_min_s, wait_s)
    elif kind is FailureKind.EXHAUSTED:
        retry_after_s = admission.retry_after_s(max(1, verdict.missing_blocks), now_s, noted=not event.resumed)
    elif kind is FailureKind.UNAVAILABLE:
        retry_after_s = admission.retry_after_min_s
    failure = Failure(kind=kind, message=verdict.message, retry_after_s=retry_after_s)
    return ReplyRefusal(session=event.session, plan_id=event.plan_id, failure=failure, cause=verdict.cause)


def turned_away(turned: Turned, admission: Admission, now_s: float) -> ReplyRefusal:
    """The answer to a request that may not wait (any more)."""
    soon = "" if turned.wait_s is None else f"; at the present pace its wait would be {turned.wait_s:.1f} s"
    match turned.cause:
        case "wait_too_long":
            message = f"The cluster is full{soon}, which is longer than it may wait."
        case "no_worker":
            message = "No worker was usable for as long as the request may wait for one."
        case "line_full":
            message = f"The cluster is full, and as many requests wait as may{soon}."
        case _:
            message = f"The cluster is full, and the request has waited for as long as it may{soon}."
    not_placed = NotPlaced(cause=turned.cause, message=message)
    return refusal(turned.event, not_placed, admission, now_s, wait_s=turned.retry_after_s)
