"""How a pace is reckoned that forgets exponentially: what is left of what was counted, and what is too slow to use."""

from __future__ import annotations

import math

KNOWN_AFTER_S = 0.5
"""Counting for less long than this says nothing about a pace."""
PACE_MIN_PER_S = 1e-6
"""Less than one in eleven days is no pace. What fades never gets to zero, and to divide by it ends in infinity."""


def left_after(elapsed_s: float, window_s: float) -> float:
    """What is left of one after so long. A clock that went back does not bring anything back."""
    return math.exp(-max(0.0, elapsed_s) / window_s)
