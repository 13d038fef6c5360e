"""When a worker without room says to come back."""

from __future__ import annotations

import pytest

from worker.advice import Advice
from worker.config import WorkerConfig

CONFIG = WorkerConfig(retry_after_min_s=1.0, retry_after_max_s=100.0, come_back_share=0.5)


def test_before_anything_ended_nobody_knows_and_they_are_told_different_times() -> None:
    made = Advice(CONFIG)
    assert [made.retry_after_s(0, 0.0) for _ in range(3)] == [1.0, 3.0, 5.0]


def test_it_follows_the_pace_at_which_requests_or_blocks_are_given_back() -> None:
    requests, blocks = Advice(CONFIG), Advice(CONFIG)
    for tenth in range(200):
        requests.released(4, tenth / 10)
        blocks.released(4, tenth / 10)
    # Ten requests of four blocks end each second; half of the pace is for who comes back.
    assert [requests.retry_after_s(0, 20.0) for _ in range(3)] == pytest.approx([1.0, 1.2, 1.4], rel=0.05)
    assert [blocks.retry_after_s(80, 20.0) for _ in range(3)] == pytest.approx([2.0, 6.0, 10.0], rel=0.05)


def test_it_is_bounded() -> None:
    made = Advice(CONFIG)
    made.released(1, 0.0)
    assert all(1.0 <= made.retry_after_s(1000, 1.0) <= 100.0 for _ in range(50))


@pytest.mark.parametrize("blocks", [0, 80])
def test_hours_in_which_nothing_ended_are_as_if_nothing_ever_had(blocks: int) -> None:
    made = Advice(CONFIG)
    made.released(10, 0.0)
    told = [made.retry_after_s(blocks, float(second)) for second in range(1, 3 * 3600, 60)]
    assert all(1.0 <= each <= 100.0 for each in told) and told[-1] == 1.0


def test_who_goes_elsewhere_takes_nobody_s_time() -> None:
    made = Advice(CONFIG)
    assert [made.retry_after_s(0, 0.0, noted=False) for _ in range(200)] == [1.0] * 200
    assert [made.retry_after_s(0, 0.0) for _ in range(2)] == [1.0, 3.0]
