"""The number of one incarnation of an engine: the clock, but at least a floor where the last epoch is known."""

from __future__ import annotations

import time


def next_epoch(at_least: int) -> int:
    """Milliseconds since 1970, or ``at_least`` if the clock was put back behind it: a successor must look newer."""
    return max(time.time_ns() // 1_000_000, at_least)
