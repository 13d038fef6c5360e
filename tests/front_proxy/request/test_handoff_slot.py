"""One request's hand-offs: each that ever came is released once, whichever worker made it."""

from __future__ import annotations

import msgspec
import pytest

from front_proxy.request.handoff_slot import HandoffSlot
from tests.support.request_flow import handoff

HANDOFF = handoff()


@pytest.mark.parametrize("change", [{"worker_id": "prefill-1"}, {"epoch": 2}, {"lease_id": "lease-2"}], ids=str)
@pytest.mark.parametrize("released", [False, True])
def test_a_late_hand_off_of_another_worker_start_or_lease_is_released_too(
    change: dict[str, object], released: bool
) -> None:
    held = HandoffSlot()
    held.hold(HANDOFF)
    if released:
        held.release(pulled=True)
    other = msgspec.structs.replace(HANDOFF, **change)
    assert held.release_late(HANDOFF) == []
    assert [release.handoff for release in held.release_late(other)] == [other]
    assert held.release_late(other) == []
