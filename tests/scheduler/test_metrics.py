"""What a scheduler's metrics show, and that sampling leaves no policy out."""

from __future__ import annotations

import itertools

import pytest
from prometheus_client import CollectorRegistry

from scheduler.api.events import FrontJoined, PlanRequested, WorkerJoined, WorkerLoadReported
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from scheduler.metrics import POLICY_SAMPLE_EVERY, PolicyProbe, SchedulerMetrics
from tests.scheduler.cast import FRONT, ready, worker_info

POLICIES = (
    "ready",
    "kv_capacity",
    "kv_headroom",
    "request_slots",
    "suspect",
    "pair_cost",
)


def test_every_policy_is_sampled_in_the_long_run() -> None:
    metrics = SchedulerMetrics(CollectorRegistry())
    clock = itertools.count()
    core = SchedulerCore(SchedulerConfig(), probe=PolicyProbe(metrics, read_s=lambda: float(next(clock))))
    for session, worker_id in enumerate(("p0", "d0")):
        core.handle(WorkerJoined(session=session, info=worker_info(worker_id, kv_blocks_total=10_000)), 0.0)
        core.handle(WorkerLoadReported(session=session, worker_id=worker_id, load=ready()), 0.0)
    core.handle(FrontJoined(session=FRONT, front_proxy_id="front-0"), 0.0)
    for plan_id in range(POLICY_SAMPLE_EVERY):
        event = PlanRequested(session=FRONT, plan_id=plan_id, request_id="r", prompt_tokens=64, output_tokens_max=32)
        core.handle(event, 0.0)
    for policy in POLICIES:
        count = metrics.registry.get_sample_value("baton_scheduler_policy_duration_seconds_count", {"policy": policy})
        assert count, policy


@pytest.mark.parametrize(("outcome", "label"), [("finished", "finished"), ("made up by a peer", "other")])
def test_outcomes_are_a_closed_set_of_labels(outcome: str, label: str) -> None:
    metrics = SchedulerMetrics(CollectorRegistry())
    metrics.request_ended(outcome)
    assert metrics.registry.get_sample_value("baton_scheduler_requests_ended_total", {"outcome": label}) == 1
