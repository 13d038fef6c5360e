"""When a worker without room says to come back."""

from __future__ import annotations

import pytest

from worker.advice import Advice
from worker.config import WorkerConfig

CONFIG = WorkerConfig(retry_after_min_s=1.0, retry_after_max_s=100.0)


def test_before_anything_ended_it_is_the_least() -> None:
    made = Advice(CONFIG)
    assert [made.retry_after_s(blocks, 5.0, 0.5) for blocks in (0, 80)] == [1.0, 1.0]


def test_it_follows_the_pace_at_which_requests_or_blocks_are_given_back() -> None:
    made = Advice(CONFIG)
    for second in range(100):
        made.released(4, float(second))
    assert made.retry_after_s(0, 100.0, 0.5) == pytest.approx(1.0, rel=0.12)
    assert made.retry_after_s(80, 100.0, 0.5) == pytest.approx(20.0, rel=0.12)
