"""When a refused request should come back: its queue over the pace of that queue, bounded and spread. Pure."""

from __future__ import annotations

RETRY_AFTER_MIN_S = 2.0
RETRY_AFTER_MAX_S = 40.0


def retry_after_s(queued: float, rate_per_s: float | None, *, draw: float) -> float:
    """``queued`` over ``rate_per_s`` within the bounds, times a factor from 0.5 to 1.5: ``draw`` is from [0, 1).

    Bounded before it is spread: otherwise half of those at a bound would get the bound itself, and return together.
    ``rate_per_s`` None: it is not known, and the lower bound is taken.
    """
    estimate_s = queued / rate_per_s if rate_per_s is not None else RETRY_AFTER_MIN_S
    return min(max(estimate_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S) * (0.5 + draw)
