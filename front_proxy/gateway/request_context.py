"""What the HTTP layer and the engine client tell each other about one request. Holds values only."""

from __future__ import annotations

from contextvars import ContextVar

from front_proxy.gateway.identity import Asker
from front_proxy.request.generation import Phases
from runtime.clock import SystemClock
from runtime.failures import Failure

# The event loop's own clock ticks in milliseconds under uvloop.
CLOCK = SystemClock()


class RequestNotes:
    """Lives as long as one HTTP request; tasks started for it see the same object."""

    __slots__ = ("asker", "deadline_s", "failure", "phases", "render_s", "shown", "started_s")

    def __init__(self, started_s: float, deadline_s: float | None = None) -> None:
        self.started_s = started_s
        """On CLOCK."""
        self.asker = Asker()
        """On whose behalf it comes."""
        self.deadline_s = deadline_s
        """Time the client gave it from then. None: the configured one."""
        self.render_s: float | None = None
        """Until the first sequence was handed to the dispatcher: reading, tokenising, validating."""
        self.phases: Phases | None = None
        """Of the first sequence that produced a token."""
        self.failure: Failure | None = None
        """Why generation failed, when it did not end well."""
        self.shown = False
        """Something was generated already."""


NOTES: ContextVar[RequestNotes | None] = ContextVar("baton_request_notes", default=None)


def server_timing(notes: RequestNotes) -> str | None:
    """The phases as a Server-Timing value in milliseconds, the total last; None when no token was produced."""
    spans = _spans(notes)
    if spans is None:
        return None
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in spans.items())


def phases_ms(notes: RequestNotes) -> dict[str, float] | None:
    """The same as numbers, for the comment line that ends a stream."""
    spans = _spans(notes)
    return None if spans is None else {f"{name}_ms": round(seconds * 1000, 3) for name, seconds in spans.items()}


def _spans(notes: RequestNotes) -> dict[str, float] | None:
    if notes.phases is None:
        return None
    phases = notes.phases
    spans = {
        "render": notes.render_s or 0.0,
        "plan": phases.plan_s,
        "queue": phases.queue_s,
        "prefill": phases.prefill_s,
        "first_token_out": phases.first_token_out_s,
        "handoff": phases.handoff_s,
        "decode_admission": phases.decode_admission_s,
    }
    return {**spans, "total": sum(spans.values())}
