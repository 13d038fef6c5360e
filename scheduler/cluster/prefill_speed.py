"""How fast a worker computes prompts, learnt from its load reports. Pure."""

from __future__ import annotations

from runtime.timing.decaying_rate import DecayingRate

SAMPLE_MIN_S = 0.05
"""A sample over less time than this is noise; shorter reports are joined."""
BUSY_WINDOW_S = 5.0
"""Memory of the speed, in time in which the worker was busy."""


class PrefillSpeed:
    """An assumption until it is ``observed``."""

    def __init__(self, assumed_tokens_per_s: float, now_s: float) -> None:
        self.tokens_per_s = assumed_tokens_per_s
        self.observed = False
        self._since_s = now_s
        self._queued_tokens = 0
        self._assigned_tokens = 0
        self._computed = DecayingRate(BUSY_WINDOW_S)

    def assigned(self, tokens: int) -> None:
        """A prompt was sent there."""
        self._assigned_tokens += tokens

    def reported(self, queued_tokens: int, now_s: float) -> None:
        """Learn from what was computed since the last report. Only between two busy ones is that all it can compute."""
        elapsed_s = now_s - self._since_s
        if elapsed_s < SAMPLE_MIN_S:
            return
        before, assigned = self._queued_tokens, self._assigned_tokens
        self._since_s, self._queued_tokens, self._assigned_tokens = now_s, queued_tokens, 0
        if before > 0 and queued_tokens > 0:
            # A prompt on its way to the worker counts too early here and too late in the next sample: sums are right.
            self._computed.passed(elapsed_s)
            self._computed.add(before + assigned - queued_tokens)
            if (pace := self._computed.per_s) is not None:
                self.tokens_per_s, self.observed = pace, True
        elif before > self.tokens_per_s * elapsed_s:
            # It ran dry at some moment in between: only a lower bound.
            self.tokens_per_s, self.observed = before / elapsed_s, True
