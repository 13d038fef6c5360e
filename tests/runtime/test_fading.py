"""A pace that fades is none in the end, and never a number by which nothing can be divided."""

from __future__ import annotations

import pytest

from runtime.fading import PACE_MIN_PER_S
from runtime.release_rate import ReleaseRate
from scheduler.drain_rate import DrainRate


@pytest.mark.parametrize("interval_s", [0.1, 0.5, 1.0, 2.0, 300.0])
def test_hours_in_which_nothing_happens_end_a_pace(interval_s: float) -> None:
    released, drained = ReleaseRate(window_s=10.0), DrainRate(window_s=10.0)
    released.released(10, 0.0)
    drained.busy(waiting=True, now_s=0.0)
    drained.drained(200)
    for turn in range(1, int(3 * 3600 / interval_s)):
        now_s = turn * interval_s
        drained.busy(waiting=True, now_s=now_s)
        pace = released.per_s(now_s)
        assert pace == 0.0 or pace >= PACE_MIN_PER_S
        assert drained.tokens_per_s is None or drained.tokens_per_s >= PACE_MIN_PER_S
    assert released.per_s(3 * 3600.0) == 0.0 and drained.tokens_per_s is None
