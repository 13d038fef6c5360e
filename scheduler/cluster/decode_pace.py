"""How prompts that a decode worker computes slow down the requests that decode there. Pure.

A step that computes a chunk of a prompt gives every decoding request one token, like any other, and takes much longer.
What a request feels is its mean time between tokens, so what counts is the share of the time of a whole output that
goes to prompts.
"""

from __future__ import annotations

import math

WINDOW_MIN_S = 0.05
WINDOW_MAX_S = 30.0
SHARE_MAX = 0.95
LENGTH_STEP = 0.01
"""What one output moves the typical length."""


class OutputLengths:
    """The geometric mean of the outputs of late. Short outputs feel a stall most, and it leans to them."""

    __slots__ = ("_log", "_typical")

    def __init__(self) -> None:
        self._log = math.log(64.0)
        self._typical = math.exp(self._log)

    def learn(self, tokens: int) -> None:
        """A request ended."""
        self._log += LENGTH_STEP * (math.log(max(1, tokens)) - self._log)
        self._typical = math.exp(self._log)

    def window_s(self, step_s: float) -> float:
        """How long a typical output takes in steps of this length."""
        window_s = self._typical * step_s
        # Comparisons: this is asked a dozen times for a plan, and min and max cost five times as much.
        if window_s < WINDOW_MIN_S:
            return WINDOW_MIN_S
        if window_s > WINDOW_MAX_S:
            return WINDOW_MAX_S
        return window_s


class PromptShare:
    """Seconds of prompts over the seconds of a window, both fading."""

    __slots__ = ("_at_s", "_share")

    def __init__(self) -> None:
        self._share = 0.0
        self._at_s = 0.0

    def add(self, compute_s: float, window_s: float, now_s: float) -> None:
        """A prompt is computed there."""
        self._share = self.at(window_s, now_s) + compute_s / window_s
        self._at_s = now_s

    def at(self, window_s: float, now_s: float) -> float:
        """The share now; above 1 where more is sent than can be computed."""
        if self._share == 0.0:
            return 0.0
        return self._share * math.exp((self._at_s - now_s) / window_s)


def pace_s(step_s: float, share: float) -> float:
    """Mean time between tokens where steps take ``step_s`` and prompts this share of the time."""
    if share > SHARE_MAX:
        share = SHARE_MAX
    return step_s / (1.0 - share)
