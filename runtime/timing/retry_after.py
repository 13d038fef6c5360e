"""When a refused request should come back: its queue over the pace of that queue, bounded and spread. Pure."""

from __future__ import annotations


def retry_after_s(queued: float, rate_per_s: float | None, *, min_s: float, max_s: float, draw: float) -> float:
    """``queued`` over ``rate_per_s`` within the bounds, half of it more or less by chance: ``draw`` is from [0, 1).

    Bounded before it is spread: behind it, half of all that are at a bound would come back at the same moment.
    ``rate_per_s`` None: it is not known, and the lower bound is taken.
    """
    estimate_s = queued / rate_per_s if rate_per_s is not None else min_s
    return min(max(estimate_s, min_s), max_s) * (0.5 + draw)
