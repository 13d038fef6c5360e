"""The load that is called 1.0: the highest rate at which the best of some policies keeps its SLOs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

ATTAINMENT_TARGET = 0.9
TOLERANCE = 0.02
# How often the first guess is doubled or halved.
DOUBLINGS_MAX = 12


class NoCapacity(ValueError):
    """No rate was found: the SLOs are missed however slow the trace is, or kept however fast."""


def mean_kept(attainments: Iterable[float], count: int) -> bool:
    """Whether the mean of ``count`` attainments is at least the target. Reads no more of them than that takes."""
    missing = 0.0
    for attainment in attainments:
        missing += 1.0 - attainment
        if missing > count * (1.0 - ATTAINMENT_TARGET):
            return False
    return True


def highest_speed(policies: Sequence[str], keeps: Callable[[str, float], bool], guess: float = 1.0) -> float:
    """The highest speed-up of a trace, to ``TOLERANCE``, at which one policy keeps its attainment.

    ``keeps(policy, speed)`` is asked as seldom as possible: a policy that does not at one speed is not asked at a
    higher one, and who did last is asked first. Raises NoCapacity.
    """
    missed_at: dict[str, float] = {}
    order = list(policies)

    def kept(speed: float) -> bool:
        for policy in list(order):
            if missed_at.get(policy, speed + 1) <= speed:
                continue
            if keeps(policy, speed):
                order.remove(policy)
                order.insert(0, policy)
                return True
            missed_at[policy] = speed
        return False

    low, high = _bracket(kept, guess)
    while high > low * (1 + TOLERANCE):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low


def _bracket(kept: Callable[[float], bool], guess: float) -> tuple[float, float]:
    """A speed at which the SLOs are kept, and twice that, at which they are not."""
    at_guess = kept(guess)
    low = guess
    for _ in range(DOUBLINGS_MAX):
        if at_guess:
            if not kept(low * 2):
                return low, low * 2
            low *= 2
        else:
            low /= 2
            if kept(low):
                return low, low * 2
    raise NoCapacity(
        f"no load 1.0: attainment stays {'at least' if at_guess else 'below'} {ATTAINMENT_TARGET:.0%} at {low:g} times "
        "the trace's rate"
    )
