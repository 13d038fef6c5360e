"""Room for requests: what is admitted, and that nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.timing.retry_after import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S
from worker.admission import Admission


def test_requests_and_blocks_are_both_bounds() -> None:
    room = Admission(requests_max=2, blocks_limit=10)
    assert room.admit("a", 6, blocks_held=0, blocks_used=0) is None
    assert room.admit("b", 5, blocks_held=0, blocks_used=0) == "kv_blocks"
    assert room.admit("b", 4, blocks_held=0, blocks_used=0) is None
    assert room.admit("c", 0, blocks_held=0, blocks_used=0) == "requests_max"


def test_a_stale_report_of_the_engine_never_locks_an_idle_worker() -> None:
    assert Admission(requests_max=1, blocks_limit=10).admit("a", 5, blocks_held=0, blocks_used=10) is None


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 6)), max_size=60))
def test_whatever_comes_and_goes_the_bounds_hold_and_all_is_given_back(steps: list[tuple[str, int]]) -> None:
    room = Admission(requests_max=4, blocks_limit=10)
    for name, blocks in steps:
        if room.has(name):
            room.release(name, 0.0)
            room.release(name, 0.0)
        else:
            admitted = room.admit(name, blocks, blocks_held=0, blocks_used=0) is None
            assert room.has(name) is admitted
        assert room.requests <= 4
        assert room.blocks <= 10
    for name in "abcdef":
        room.release(name, 0.0)
    assert (room.requests, room.blocks) == (0, 0)


def test_the_wait_follows_the_rate_at_which_requests_or_blocks_are_released() -> None:
    room = Admission(requests_max=9, blocks_limit=10)
    for second in range(100):
        room.admit("a", 4, blocks_held=0, blocks_used=0)
        room.release("a", float(second))
    assert room.retry_after_s(0, 100.0, 0.5) == RETRY_AFTER_MIN_S
    assert room.retry_after_s(80, 100.0, 0.5) == pytest.approx(20.0, rel=0.12)
    assert room.retry_after_s(8000, 100.0, 0.5) == RETRY_AFTER_MAX_S
