"""What the HTTP layer and the engine client tell each other about one request. Holds values only."""

from __future__ import annotations

from contextvars import ContextVar

from front_proxy.gateway.identity import Caller
from front_proxy.request.generation import TtftPhases
from runtime.failures import Failure
from runtime.timing.clock import SystemClock

# The event loop's own clock ticks in milliseconds under uvloop.
CLOCK = SystemClock()


class RequestContext:
    """Lives as long as one HTTP request; tasks started for it see the same object."""

    __slots__ = ("caller", "deadline_s", "delivered", "failure", "phases", "render_s", "started_s")

    def __init__(self, started_s: float, deadline_s: float | None = None) -> None:
        self.started_s = started_s
        """On CLOCK."""
        self.caller = Caller()
        """Its tenant and priority class."""
        self.deadline_s = deadline_s
        """Time the client gave it from then. None: the configured one."""
        self.render_s: float | None = None
        """Until the first sequence was handed to the dispatcher: reading, tokenising, validating."""
        self.phases: TtftPhases | None = None
        """Of the first sequence that produced a token."""
        self.failure: Failure | None = None
        """Why generation failed, when it did not end well."""
        self.delivered = False
        """Something was generated already."""


REQUEST_CONTEXT: ContextVar[RequestContext | None] = ContextVar("baton_request_notes", default=None)


def server_timing(context: RequestContext) -> str | None:
    """The phases as a Server-Timing value in milliseconds, the total last; None when no token was produced."""
    spans = _spans(context)
    if spans is None:
        return None
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in spans.items())


def phases_ms(context: RequestContext) -> dict[str, float] | None:
    """The same as numbers, for the comment line that ends a stream."""
    spans = _spans(context)
    return None if spans is None else {f"{name}_ms": round(seconds * 1000, 3) for name, seconds in spans.items()}


def _spans(context: RequestContext) -> dict[str, float] | None:
    if context.phases is None:
        return None
    phases = context.phases
    spans = {
        "render": context.render_s or 0.0,
        "plan": phases.plan_s,
        "queue": phases.queue_s,
        "prefill": phases.prefill_s,
        "first_token_out": phases.first_token_out_s,
        "handoff": phases.handoff_s,
        "decode_admission": phases.decode_admission_s,
    }
    return {**spans, "total": sum(spans.values())}
