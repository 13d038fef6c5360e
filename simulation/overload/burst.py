"""A burst past the capacity of a fake cluster: three times it for half a minute, then less than it.

A client that was refused comes back when it was told to, again and again. What has to hold: of all classes together
nearly every request is served within five tries. Of interactive requests alone that is not promised: their queue is
short, so they are told to come back soon, and the excess of a burst lasts longer than a few such tries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from scheduler.api.actions import ReplyRefusal
from simulation.overload.model import Asked, Overload

BURST_S = 30.0
BURST_LOAD = 3.0
AFTER_LOAD = 0.6
TRIES_MAX = 5
SERVED_MIN = 0.99
SETTLED_S = 900.0
"""Longer than so many tries take."""


class Burst(Overload):
    """The cluster of ``Overload``; its load falls at the end of the burst."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, BURST_LOAD, tries_max=TRIES_MAX)
        self.refused: Counter[int] = Counter()
        """Refusals by the number of the try: those at the last one are for good."""
        self.asked = 0

    def run_burst(self) -> float:
        """The share of requests that was served within so many tries."""
        self._begin()
        self.world.after(BURST_S, self._calm_down)
        self.world.run(SETTLED_S)
        self.core.check()
        return 1.0 - self.refused[TRIES_MAX] / self.asked

    def _calm_down(self) -> None:
        self._arrivals_per_s *= AFTER_LOAD / BURST_LOAD

    def _ask(self, asked: Asked) -> None:
        self.asked += asked.tries == 1
        super()._ask(asked)

    def _refused(self, reply: ReplyRefusal) -> None:
        self.refused[self._asked[reply.plan_id].tries] += 1
        super()._refused(reply)


def judge(seed: int) -> Sequence[str]:
    """What does not hold after a burst; printed as it is found."""
    burst = Burst(seed)
    served = burst.run_burst()
    told = f"burst: {served:.1%} of {burst.asked} requests were served within {TRIES_MAX} tries"
    print(f"{told}, refusals by try: {dict(sorted(burst.refused.items()))}")
    return [told] if served < SERVED_MIN else []
