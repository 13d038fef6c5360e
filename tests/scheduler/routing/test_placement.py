"""What a refusal says."""

from __future__ import annotations

import pytest

from scheduler.api.events import PlanRequested
from scheduler.cluster.model_pool import ModelPool
from scheduler.config import SchedulerParameters
from scheduler.routing.placement import NotPlaced, Planner
from tests.scheduler.cast import ready, worker


@pytest.mark.parametrize(("used", "cause", "missing"), [((99, 98), "no_headroom", 1), ((100, 100), "no_headroom", 3)])
def test_a_refusal_says_the_smallest_shortage(used: tuple[int, int], cause: str, missing: int) -> None:
    pool = ModelPool()
    for index, blocks in enumerate(used):
        pool.add(worker(f"d{index}", ready(kv_blocks_used=blocks)))
    event = PlanRequested(session=1, plan_id=1, request_id="r", prompt_tokens=64, output_tokens_max=32)
    refused = Planner(SchedulerParameters(), None, None).place(event, pool, 0.0)
    assert isinstance(refused, NotPlaced)
    assert (refused.cause, refused.missing_blocks) == (cause, missing)
