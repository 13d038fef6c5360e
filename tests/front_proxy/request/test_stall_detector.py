"""When work counts as stalled: silence of its worker soon, its own alone later."""

from __future__ import annotations

import pytest

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.request.stall_detector import Awaited, stalled_s

CONFIG, LIMITS = FrontProxyConfig(), FrontProxyLimits(handoff_stall_timeout_s=20.0)


@pytest.mark.parametrize(
    ("awaited", "silent_s", "alone_s"),
    [
        (Awaited.STEP, 10.0, 60.0),
        (Awaited.PROMPT, 30.0, 120.0),
        (Awaited.PULL, 20.0, 20.0),
        (Awaited.ORPHANED_PULL, 5.0, 5.0),
    ],
)
def test_each_wait_has_a_bound_and_a_worker_that_works_for_others_a_longer_one(
    awaited: Awaited, silent_s: float, alone_s: float
) -> None:
    def stalled(*, heard_s: float, now_s: float) -> float | None:
        return stalled_s(awaited, since_s=100.0, heard_s=heard_s, now_s=now_s, config=CONFIG, limits=LIMITS)

    assert stalled(heard_s=3.0, now_s=100.0 + silent_s - 0.1) is None
    assert stalled(heard_s=3.0, now_s=100.0 + silent_s) == silent_s
    assert stalled(heard_s=100.0 + alone_s - 0.2, now_s=100.0 + alone_s - 0.1) is None
    assert stalled(heard_s=100.0 + alone_s, now_s=100.0 + alone_s) == alone_s
