"""The number of one incarnation of an engine: the clock, but at least a floor where the last epoch is known."""

from __future__ import annotations

import os
import time

EPOCH_MIN_VARIABLE = "BATON_EPOCH_MIN"
"""Tells a worker its least epoch: its predecessor's + 1. `baton up` sets it. Without it the clock alone counts."""
EPOCH_VARIABLE = "BATON_EPOCH"
"""Tells the epoch itself to the processes of one worker on several nodes, which must agree on it."""


def next_epoch() -> int:
    """Milliseconds since 1970, or the floor if the clock was put back behind it: a successor must look newer.

    Raises ValueError naming the variable when it holds no number.
    """
    return _number(EPOCH_VARIABLE) or max(time.time_ns() // 1_000_000, _number(EPOCH_MIN_VARIABLE))


def _number(variable: str) -> int:
    text = os.environ.get(variable) or "0"
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the variable {variable} must be a whole number, got {text!r}") from error
