"""KvHandoff survives the wire, and never looks longer-lived than it is."""

from __future__ import annotations

import msgspec
import pytest

from kv_transfer.handoff.wire import aged, from_wire, to_wire
from tests.support.workers import handoff

HANDOFF = handoff(
    epoch=2**63 + 1, bytes=2**40, lease_remaining_s=29.5, connector_params=b"x", prompt_digest=b"12345678"
)


def test_every_field_comes_back() -> None:
    assert from_wire(to_wire(HANDOFF)) == HANDOFF


@pytest.mark.parametrize(("left_s", "ms"), [(0.0019, 1), (-5.0, 0), (1e9, 2**32 - 1)])
def test_the_time_left_is_rounded_down_and_kept_in_range(left_s: float, ms: int) -> None:
    assert to_wire(msgspec.structs.replace(HANDOFF, lease_remaining_s=left_s)).lease_remaining_ms == ms


def test_a_forwarder_takes_off_the_time_it_held_the_hand_off() -> None:
    assert aged(HANDOFF, 9.5).lease_remaining_s == 20.0
    assert aged(HANDOFF, 100.0).lease_remaining_s == 0.0
