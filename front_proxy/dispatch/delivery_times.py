"""When the client got tokens: what each plan's end says of it, and whether the request kept its SLO. Pure.

Only the first token's time is noted, and the last token came when the request ended: no clock is read for each token.
"""

from __future__ import annotations

from typing import Literal

from front_proxy.request.events import Measured, Outcome
from front_proxy.request.generation import GenerationRequest

SloOutcome = Literal["met", "ttft_missed", "tpot_missed", "refused", "failed", "cancelled"]


class DeliveryTimes:
    """Of one request. Every moment is an argument."""

    def __init__(self, started_s: float) -> None:
        self.refused = False
        """The last answer of the scheduler was a refusal."""
        self._started_s = self._asked_s = started_s
        self._first_s: float | None = None
        self._first_of_plan_s: float | None = None

    def asked(self, now_s: float) -> None:
        """A plan is asked for."""
        self._asked_s = now_s
        self._first_of_plan_s = None

    def delivered(self, now_s: float) -> None:
        """The client gets tokens. Told of the first ones of each plan, at least."""
        if self._first_of_plan_s is None:
            self._first_of_plan_s = now_s
            if self._first_s is None:
                self._first_s = now_s

    def ttft_left_s(self, request: GenerationRequest, now_s: float) -> float:
        """What is left of the time to the first token. 0: none is asked for, or the client has the token."""
        if not request.ttft_slo_s or self._first_s is not None:
            return 0.0
        return max(self._started_s + request.ttft_slo_s - now_s, 0.001)

    def of_plan(self, outcome: Outcome, tokens: int, cached_tokens: int, finish: str, now_s: float) -> Measured:
        """What is said of a plan that is over. ``tokens``: that the client got under it."""
        first_s = self._first_of_plan_s
        if first_s is None:
            return Measured(cached_tokens=cached_tokens, finish=finish)
        # One that did not finish may have stood still before.
        paced = outcome == "finished" and tokens > 1
        return Measured(
            ttft_s=first_s - self._asked_s,
            itl_s=(now_s - first_s) / (tokens - 1) if paced else 0.0,
            cached_tokens=cached_tokens,
            finish=finish,
        )

    def slo(self, request: GenerationRequest, outcome: Outcome, tokens: int, now_s: float) -> SloOutcome:
        """What became of the times that the request asked for."""
        if outcome == "cancelled":
            return "cancelled"
        if outcome == "failed" or self._first_s is None:
            return "refused" if self.refused else "failed"
        if request.ttft_slo_s and self._first_s - self._started_s > request.ttft_slo_s:
            return "ttft_missed"
        if request.itl_slo_s and tokens > 1 and (now_s - self._first_s) / (tokens - 1) > request.itl_slo_s:
            return "tpot_missed"
        return "met"
