"""The number of one life of an engine. By the clock, and above a floor where somebody knows the last one."""

from __future__ import annotations

import time


def next_epoch(at_least: int) -> int:
    """Milliseconds since 1970, or ``at_least`` where the clock was put back behind it: successors must look newer."""
    return max(time.time_ns() // 1_000_000, at_least)
