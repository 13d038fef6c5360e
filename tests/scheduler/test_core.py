"""What the scripts ``tests/golden/scheduler_*.txt`` cannot show of the scheduler's core. They show all else."""

from __future__ import annotations

import pytest

from scheduler.api.actions import RejectWorker, ReplyPlan, ReplyRefusal
from scheduler.api.events import Tick, WorkerLeft, WorkerProgressReported
from scheduler.api.worker_progress import EngineStep
from scheduler.core import EVENT_LOG_MAX
from tests.scheduler.cast import Stage, question


@pytest.mark.parametrize("worker_id", ["p0", "d1"])
def test_workers_of_all_roles_must_agree_on_what_decides_their_tokens(worker_id: str) -> None:
    stage = Stage()
    stage.enter("d0", output_settings="hf_overrides=7 seed=2 tokenizer=a")
    (action,) = stage.join(worker_id, output_settings="reasoning_parser=8 seed=2 tokenizer=a")
    assert isinstance(action, RejectWorker)
    assert action.failure.message == (
        f"Worker {worker_id} has other engine settings than d0: hf_overrides, reasoning_parser."
    )
    stage.enter(worker_id)
    stage.enter("d0", epoch=2, output_settings="seed=3")
    assert set(stage.core.cluster.workers) == {"d0", worker_id}, "nothing said is held against no worker"


def test_what_is_remembered_of_workers_that_left_is_bounded() -> None:
    stage = Stage(workers_max=2)
    for number in range(1, 10):
        stage.join(f"d{number}")
        stage.do(WorkerLeft(session=number, worker_id=f"d{number}", reason="gone"))
    assert len(stage.core._departed) == 2


def test_the_event_log_is_bounded_and_leaves_out_heartbeats() -> None:
    stage = Stage()
    stage.enter("d0")
    for plan_id in range(EVENT_LOG_MAX * 2):
        stage.do(question(plan_id))
        stage.do(Tick())
        stage.report("d0")
    assert len(stage.core.event_log()) == EVENT_LOG_MAX
    assert all("PlanRequested" in line for line in stage.core.event_log())


def test_a_request_that_has_begun_is_not_refused_for_its_pace() -> None:
    stage = Stage()
    stage.enter("p0")
    stage.enter("d0")
    for name in ("p0", "d0"):
        session = stage.core.cluster.workers[name].session
        stage.do(
            WorkerProgressReported(
                session=session, worker_id=name, steps=(EngineStep(duration_s=0.1, prefill_tokens=256),)
            )
        )
    (refused,) = [each for each in stage.do(question(1, itl_slo_s=1e-6)) if isinstance(each, ReplyRefusal)]
    assert refused.cause == "itl_slo"
    assert any(isinstance(each, ReplyPlan) for each in stage.do(question(2, itl_slo_s=1e-6, resumed=True)))
