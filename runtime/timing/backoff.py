"""Exponential backoff. Pure: the caller counts failures, waits, and spreads the wait by chance where many wait."""

from __future__ import annotations

# 2.0**1024 is an error; so many doublings reach any bound.
_DOUBLINGS_MAX = 64


def backoff_s(failures: int, *, min_s: float, max_s: float) -> float:
    """The wait after so many failures in a row: ``min_s`` after the first, doubled for each further one."""
    assert failures >= 1, failures
    return min(min_s * 2.0 ** min(failures - 1, _DOUBLINGS_MAX), max_s)
