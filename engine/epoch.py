"""The number of one incarnation of an engine: the clock, but at least a floor where the last epoch is known."""

from __future__ import annotations

import os
import time

EPOCH_MIN_VARIABLE = "BATON_EPOCH_MIN"
"""Tells a worker its least epoch: its predecessor's + 1. `baton up` sets it. Without it the clock alone counts."""


def next_epoch() -> int:
    """Milliseconds since 1970, or the floor if the clock was put back behind it: a successor must look newer."""
    return max(time.time_ns() // 1_000_000, int(os.environ.get(EPOCH_MIN_VARIABLE) or 0))
