"""The answer to a request that is not placed: the kind of failure, the words, and the time to retry after."""

from __future__ import annotations

from runtime.failures import Failure, FailureKind
from runtime.timing.retry_after import retry_after_s
from scheduler.api.actions import ReplyRefusal
from scheduler.api.chance import Random
from scheduler.api.events import PlanRequested
from scheduler.api.explanation import Option, PlanExplained
from scheduler.queueing.wait_queue import WaitQueue, class_of
from scheduler.routing.placement import Cause

# What passes when requests end, so that waiting for it makes sense.
PASSING: frozenset[Cause] = frozenset(
    {"plans_in_flight", "no_headroom", "decode_slots", "prefill_slots", "prefill_backlog"}
)
_FINAL: dict[Cause, FailureKind] = {
    "no_worker": FailureKind.UNAVAILABLE,
    "too_large": FailureKind.BAD_REQUEST,
    "plan_id_in_use": FailureKind.BAD_REQUEST,
}
_MESSAGES: dict[Cause, str] = {
    "plan_id_in_use": "The plan_id is in use.",
    "wait_too_long": "The cluster is full, and at the present pace the request would wait longer than it may.",
    "queue_full": "The cluster is full, and as many requests wait as may.",
    "waited_out": "The cluster is full, and the request has waited for as long as it may.",
    "no_worker": "No worker was usable for as long as the request may wait for one.",
}
NONE_CAME = "No decode worker is ready, and the request has waited for as long as it may."


class Refusals:
    """Answers in words; the queue says how long it is."""

    def __init__(self, queue: WaitQueue, rng: Random | None) -> None:
        self._queue = queue
        self._rng = rng
        # Because no decode worker would have kept the time between tokens.
        self.itl = 0

    def refuse(
        self,
        event: PlanRequested,
        cause: Cause,
        message: str = "",
        *,
        options: tuple[Option, ...] = (),
        waited_s: float = 0.0,
        retry_after_s: float = 0.0,
    ) -> ReplyRefusal:
        """The answer to a request that gets no place. One that can never be placed is not told to retry.

        Without ``message`` the cause has one of its own; without ``retry_after_s`` the queue says when to retry.
        """
        self.itl += cause == "itl_slo"
        kind = _FINAL.get(cause, FailureKind.EXHAUSTED)
        when_s = None if kind is FailureKind.BAD_REQUEST else retry_after_s or self._retry_after_s(event)
        failure = Failure(kind=kind, message=message or _MESSAGES[cause], retry_after_s=when_s)
        explained = PlanExplained(
            request_id=event.request_id,
            prompt_tokens=event.prompt_tokens,
            options=options,
            ttft_slo_s=event.ttft_slo_s,
            itl_slo_s=event.itl_slo_s,
        )
        return ReplyRefusal(
            session=event.session,
            plan_id=event.plan_id,
            failure=failure,
            cause=cause,
            waited_s=waited_s,
            explained=explained,
        )

    def _retry_after_s(self, event: PlanRequested) -> float:
        tokens, pace = self._queue.ahead_of(class_of(event), event.tenant)
        return retry_after_s(tokens, pace, draw=self._rng.random() if self._rng is not None else 0.5)
