"""A burst past the capacity of a fake cluster: three times it for half a minute, then less than it.

A client that was refused comes back when it was told to, again and again. What has to hold: of all classes together
nearly every request is served within five tries. Of interactive requests alone that is not promised: their queue is
short, so they are told to come back soon, and the excess of a burst lasts longer than a few such tries.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulation.overload.model import Overload

BURST_S = 30.0
BURST_LOAD = 3.0
AFTER_LOAD = 0.6
TRIES_MAX = 5
SERVED_MIN = 0.99
SETTLED_S = 900.0
"""Longer than so many tries take."""


def judge(seed: int) -> Sequence[str]:
    """What does not hold after a burst; printed as it is found."""
    burst = Overload(seed, BURST_LOAD, tries_max=TRIES_MAX)
    burst.world.after(BURST_S, burst.slow_down, AFTER_LOAD / BURST_LOAD)
    burst.run(SETTLED_S)
    # A refusal at the last try is for good.
    served = 1.0 - burst.refused[TRIES_MAX] / burst.clients
    told = f"burst: {served:.1%} of {burst.clients} requests were served within {TRIES_MAX} tries"
    print(f"{told}, refusals by try: {dict(sorted(burst.refused.items()))}")
    return [told] if served < SERVED_MIN else []
