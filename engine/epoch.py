"""The number of one incarnation of an engine: the clock, but at least a floor where the last epoch is known."""

from __future__ import annotations

import os
import time

EPOCH_MIN_VARIABLE = "BATON_EPOCH_MIN"
"""Tells a worker its least epoch: its predecessor's + 1. `baton up` sets it. Without it the clock alone counts."""


def next_epoch() -> int:
    """Milliseconds since 1970, or the floor if the clock was put back behind it: a successor must look newer.

    Raises ValueError naming the variable when it holds no number.
    """
    floor = os.environ.get(EPOCH_MIN_VARIABLE) or "0"
    try:
        return max(time.time_ns() // 1_000_000, int(floor))
    except ValueError as error:
        raise ValueError(f"the variable {EPOCH_MIN_VARIABLE} must be a whole number, got {floor!r}") from error
