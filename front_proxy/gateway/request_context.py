"""What an API and the engine client tell each other about one request. Holds values only."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

from front_proxy.dispatch.attempts import Lane
from front_proxy.dispatch.bills import Bills
from front_proxy.gateway.identity import Caller
from front_proxy.gateway.in_flight import Place
from front_proxy.request.bill import Bill
from front_proxy.request.generation import TtftPhases
from runtime.failures import Failure
from runtime.timing.clock import SystemClock

# The event loop's own clock ticks in milliseconds under uvloop.
CLOCK = SystemClock()
TTFT_LEFT_MIN_S = 0.001
"""What is left of a time that is over: 0 would mean that none was asked for."""


class Outlet(Protocol):
    """Where output of the middle of a stream may be written without waiting."""

    @property
    def open(self) -> bool:
        """Whether more may be written now: the stream has begun, and the client has read enough of it."""
        ...

    def write(self, text: str, token_ids: list[int]) -> bool:
        """Send what some tokens add to the output. False: the client has left, and it goes nowhere."""
        ...

    def lane(self, delivered: list[int]) -> Lane | None:
        """Where tokens without text may go past all else that belongs to the request. None: nowhere."""
        ...


class RequestContext:
    """Lives as long as one request; tasks started for it see the same object."""

    def __init__(self, caller: Caller, place: Place | None, deadline_s: float | None = None) -> None:
        self.started_s = CLOCK.monotonic_s()
        """On CLOCK."""
        self.caller = caller
        """Its tenant and priority class."""
        self.place = place
        """None: it may generate nothing."""
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
        self.one_token = False
        """A parser reads its output that may be given only one token at a time."""
        self.bill: Bill | None = None
        """What it is billed. None: nothing is counted."""
        self.outlet: Outlet | None = None
        """Of a stream that is text alone. None: its reader writes everything."""
        self.validated: Any = None
        """What the engine client made of it, for others like it."""
        self.asked: dict[str, Any] | None = None
        """How vLLM's objects were asked to answer it, for others like it. None: that is not to be noted."""

    def close_bill(self, bills: Bills, *, answered: bool) -> None:
        """The answer is over. ``answered``: something of it was given to the client."""
        if self.bill is not None:
            ttft_s = 0.0 if self.phases is None else self.phases.total_s + (self.render_s or 0.0)
            bills.close(self.bill, answered=answered, failed=self.failure is not None, ttft_s=ttft_s)

    def ttft_left_s(self) -> float:
        """What is left of the time to the first token that its client asks for. 0: none is asked for."""
        asked_s = self.caller.ttft_slo_s
        return max(asked_s - (CLOCK.monotonic_s() - self.started_s), TTFT_LEFT_MIN_S) if asked_s else 0.0


REQUEST_CONTEXT: ContextVar[RequestContext] = ContextVar("baton_request_context")
"""Set by both APIs before vLLM sees the request."""


def phases_ms(context: RequestContext) -> dict[str, float]:
    """The parts of the time to the first token, the total last, in milliseconds. Empty: no token was produced."""
    phases = context.phases
    if phases is None:
        return {}
    parts_s = {
        "render": context.render_s or 0.0,
        "plan": phases.plan_s,
        "queue": phases.queue_s,
        "prefill": phases.prefill_s,
        "first_token_out": phases.first_token_out_s,
        "handoff": phases.handoff_s,
        "decode_admission": phases.decode_admission_s,
    }
    return {name: round(seconds * 1000, 3) for name, seconds in (parts_s | {"total": sum(parts_s.values())}).items()}
