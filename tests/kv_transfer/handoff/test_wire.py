"""A hand-off on the wire never looks longer-lived than it is. That every field survives: tests/contract."""

from __future__ import annotations

import pytest

from kv_transfer.handoff.wire import aged, to_wire
from tests.support.workers import handoff


@pytest.mark.parametrize(("left_s", "ms"), [(0.0019, 1), (-5.0, 0), (1e9, 2**32 - 1)])
def test_the_time_left_is_rounded_down_and_kept_in_range(left_s: float, ms: int) -> None:
    assert to_wire(handoff(lease_remaining_s=left_s)).lease_remaining_ms == ms


def test_a_forwarder_takes_off_the_time_it_held_the_hand_off() -> None:
    assert aged(handoff(lease_remaining_s=29.5), 9.5).lease_remaining_s == 20.0
    assert aged(handoff(), 100.0).lease_remaining_s == 0.0
