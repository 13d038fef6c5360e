"""A scheduler that was away takes its books over from those who were there."""

from __future__ import annotations

import pytest

from scheduler.api.actions import Placement, PublishView
from scheduler.api.events import (
    FrontJoined,
    FrontLeft,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    RunningPlan,
    Tick,
    WorkerJoined,
    WorkerLeft,
)
from scheduler.config import WaitingConfig
from scheduler.core import SchedulerCore
from tests.scheduler.cast import FRONT, Stage, worker_info


def running(plan_id: int, decode: str | None = "d0", *, blocks: int = 3, epoch: int = 1) -> RunningPlan:
    return RunningPlan(
        plan_id=plan_id,
        request_id=f"r{plan_id}",
        prefill=Placement("p0", "p0:1", 1),
        decode=Placement(decode, f"{decode}:1", epoch) if decode else None,
        decode_blocks=blocks,
    )


def tell(stage: Stage, *plans: RunningPlan, complete: bool = False, asked: frozenset[int] = frozenset()) -> None:
    stage.do(PlansRunning(session=FRONT, plans=plans, complete=complete, asked=asked))


def restarted(**config: float) -> Stage:
    """A scheduler that has just begun, to which one front proxy has reconnected."""
    stage = Stage(**config)
    stage.core = SchedulerCore(stage.core._config, began_s=0.0)
    stage.do(FrontJoined(session=FRONT, front_proxy_id="front-0"))
    return stage


def test_a_plan_that_another_made_is_reserved_and_ends_like_any_other() -> None:
    stage = restarted()
    stage.enter("d0")
    tell(stage, running(1), running(2))
    assert stage.reserved("d0") == 6
    tell(stage, running(1))
    assert stage.reserved("d0") == 6, "said again, it is known"
    tell(stage, running(2), complete=True)
    assert stage.reserved("d0") == 3, "what a complete list leaves out is over"
    stage.do(FrontLeft(session=FRONT))
    assert stage.reserved("d0") == 0 == stage.core.plans_in_flight


@pytest.mark.parametrize("planned_at", ["d0", "d1", None])
def test_a_waiting_request_that_its_front_proxy_planned_itself_gets_no_second_plan(planned_at: str | None) -> None:
    stage = Stage(waiting=WaitingConfig())
    stage.enter("p0")
    for worker_id in ("d0", "d1"):
        stage.enter(worker_id, requests_max=1)
    first = [stage.plan() for _ in range(2)]
    question = PlanRequested(session=FRONT, plan_id=50, request_id="r50", prompt_tokens=64, output_tokens_max=32)
    stage.do(question)
    assert sum(stage.core.waiting().values()) == 1
    tell(stage, running(50, planned_at), complete=True, asked=frozenset(plan.plan_id for plan in first))
    assert sum(stage.core.waiting().values()) == 0
    for plan in first:
        stage.do(RequestEnded(session=FRONT, plan_id=plan.plan_id))
    assert stage.core.plans_in_flight == 1
    stage.do(RequestEnded(session=FRONT, plan_id=50))
    assert stage.core.plans_in_flight == stage.reserved("d0") == stage.reserved("d1") == 0


def test_a_front_proxy_on_a_second_stream_reserves_once_while_the_first_has_not_ended_here() -> None:
    stage = Stage(waiting=WaitingConfig())
    stage.enter("p0")
    stage.enter("d0", requests_max=2)
    plans = [stage.plan() for _ in range(2)]
    waits = PlanRequested(session=FRONT, plan_id=50, request_id="r50", prompt_tokens=64, output_tokens_max=32)
    stage.do(waits)
    assert sum(stage.core.waiting().values()) == 1
    again = FRONT + 1
    stage.do(FrontJoined(session=again, front_proxy_id="front-0"))
    stage.do(FrontJoined(session=again + 1, front_proxy_id="front-1"))
    told = tuple(running(plan.plan_id, blocks=plan.decode_blocks_reserved) for plan in plans)
    before = stage.reserved("d0")
    stage.do(PlansRunning(session=again, plans=told, complete=True, asked=frozenset({50})))
    assert (stage.reserved("d0"), stage.core.plans_in_flight) == (before, 2)
    assert sum(stage.core.waiting().values()) == 0, "it is about to ask again on the new one"
    stage.do(PlansRunning(session=FRONT, plans=told, complete=True))
    assert stage.core.plans_in_flight == 2, "said on the first one before it was lost"
    stage.do(RequestEnded(session=FRONT, plan_id=plans[0].plan_id))
    stage.do(FrontLeft(session=FRONT))
    assert (stage.reserved("d0"), stage.core.plans_in_flight) == (before, 2)
    stage.do(RequestEnded(session=again, plan_id=plans[0].plan_id))
    stage.do(FrontLeft(session=again))
    assert stage.reserved("d0") == 0 == stage.core.plans_in_flight


def test_a_question_on_its_way_is_not_taken_for_an_end() -> None:
    stage = restarted()
    stage.enter("d0")
    plan = stage.plan()
    tell(stage, complete=True, asked=frozenset({plan.plan_id}))
    assert stage.reserved("d0") == 3
    tell(stage, complete=True)
    assert stage.reserved("d0") == 0


def test_a_plan_on_an_engine_that_was_started_again_reserves_nothing() -> None:
    stage = restarted()
    tell(stage, running(1, epoch=1))
    stage.enter("d0", epoch=2)
    assert stage.reserved("d0") == 0


def test_more_than_a_worker_has_is_never_reserved() -> None:
    stage = restarted()
    stage.enter("d0")
    tell(stage, running(1, blocks=80), running(2, blocks=80))
    assert stage.reserved("d0") == 100
    tell(stage, complete=True)
    assert stage.reserved("d0") == 0


def test_a_worker_whose_stream_broke_finds_its_reservations_again() -> None:
    stage = Stage()
    stage.enter("p0")
    stage.enter("d0")
    plan = stage.plan()
    stage.do(WorkerLeft(session=stage.session_of["d0"], worker_id="d0", reason="cut"))
    stage.enter("d0")
    assert stage.reserved("d0") == 3
    stage.end(plan)
    assert stage.reserved("d0") == 0


def test_plans_taken_over_respect_the_bound_on_plans() -> None:
    stage = restarted(plans_in_flight_max=2)
    stage.enter("d0")
    tell(stage, *(running(plan_id) for plan_id in range(1, 5)))
    assert stage.core.plans_in_flight == 2


@pytest.mark.parametrize("grace_s", [0.0, 3.0])
def test_only_a_grace_period_makes_a_scheduler_keep_room(grace_s: float) -> None:
    stage = restarted(recovery_grace_s=grace_s)
    stage.do(WorkerJoined(session=1, info=worker_info("d0")))
    assert stage.core.recovering == (grace_s > 0)
    assert (stage.core.cluster.workers["d0"].recovery_reserve > 0) == (grace_s > 0)


def test_what_one_process_says_takes_nothing_from_another_one_of_its_id() -> None:
    stage = Stage(waiting=WaitingConfig())
    stage.enter("d0", requests_max=1)
    first, second = FRONT + 1, FRONT + 2
    for session in (first, second):
        stage.do(FrontJoined(session=session, front_proxy_id="web", incarnation=session))
    for plan_id in (1, 2):
        ask = PlanRequested(session=first, plan_id=plan_id, request_id="r", prompt_tokens=64, output_tokens_max=32)
        stage.do(ask)
    stage.do(PlansRunning(session=second, plans=(), complete=True))
    assert (stage.core.plans_in_flight, sum(stage.core.waiting().values())) == (1, 1)
    stage.do(FrontJoined(session=second + 1, front_proxy_id="web", incarnation=first))
    stage.do(PlansRunning(session=second + 1, plans=(), complete=True))
    assert (stage.core.plans_in_flight, sum(stage.core.waiting().values())) == (0, 0)


def test_after_all_peers_were_lost_it_recovers_as_after_a_start() -> None:
    """Its network was cut: those who return first know of workers that it does not know yet."""
    stage = Stage(recovery_grace_s=3.0, worker_lease_s=10.0)
    for worker_id in ("p0", "d0", "d1"):
        stage.enter(worker_id)
    stage.now_s = 100.0
    stage.do(Tick())
    for worker_id in ("p0", "d0", "d1"):
        stage.do(WorkerLeft(session=stage.session_of[worker_id], worker_id=worker_id, reason="cut"))
    stage.do(FrontLeft(session=FRONT))
    stage.do(FrontJoined(session=FRONT + 1, front_proxy_id="front-0"))
    careful = [stage.core.recovering]
    stage.now_s = 102.0
    stage.enter("d0")
    stage.now_s = 109.0
    stage.report("d0")
    stage.do(Tick())
    careful.append(stage.core.recovering)
    stage.now_s = 110.0
    assert PublishView(at_once=True) in stage.do(Tick())
    assert [*careful, stage.core.recovering] == [True, True, False]


def test_after_isolation_it_recovers_whichever_peer_returns_first() -> None:
    """It was cut off: that they left it is told all at once, while some are back already."""
    stage = Stage(recovery_grace_s=3.0, silence_timeout_s=3.0, worker_lease_s=10.0)
    for worker_id in ("d0", "d1"):
        stage.enter(worker_id)
    for now_s in (4.0, 5.0):
        stage.now_s = now_s
        stage.do(Tick())
    stage.do(FrontJoined(session=FRONT + 1, front_proxy_id="front-1"))
    for worker_id in ("d0", "d1"):
        stage.do(WorkerLeft(session=stage.session_of[worker_id], worker_id=worker_id, reason="cut"))
    assert stage.core.recovering
    stage.now_s = 15.0
    stage.do(Tick())
    assert not stage.core.recovering


def test_one_worker_that_returns_to_the_others_changes_nothing() -> None:
    stage = Stage(recovery_grace_s=3.0)
    for worker_id in ("p0", "d0"):
        stage.enter(worker_id)
    stage.now_s = 100.0
    stage.report("p0")
    stage.report("d0")
    stage.do(Tick())
    stage.do(WorkerLeft(session=stage.session_of["d0"], worker_id="d0", reason="cut"))
    stage.enter("d0")
    assert not stage.core.recovering


def test_a_front_proxy_that_returns_to_the_workers_changes_nothing() -> None:
    stage = Stage(recovery_grace_s=3.0)
    for worker_id in ("p0", "d0"):
        stage.enter(worker_id)
    stage.now_s = 100.0
    stage.report("p0")
    stage.report("d0")
    stage.do(Tick())
    stage.do(WorkerLeft(session=stage.session_of["d0"], worker_id="d0", reason="cut"))
    stage.do(FrontLeft(session=FRONT))
    stage.do(FrontJoined(session=FRONT + 1, front_proxy_id="front-0"))
    assert not stage.core.recovering


def test_no_worker_is_removed_while_all_are_silent() -> None:
    stage = Stage(silence_timeout_s=3.0, worker_lease_s=10.0)
    for worker_id in ("p0", "d0", "d1"):
        stage.enter(worker_id)
    for now_s in range(0, 61, 1):
        stage.now_s = float(now_s)
        stage.do(Tick())
    assert set(stage.core.cluster.workers) == {"p0", "d0", "d1"}
    # Heard again: each has the whole of its lease to speak up, and then those who do not are gone.
    stage.report("d0")
    for now_s in range(61, 70):
        stage.now_s = float(now_s)
        stage.report("d0")
        stage.do(Tick())
    assert set(stage.core.cluster.workers) == {"p0", "d0", "d1"}
    stage.now_s = 71.0
    stage.report("d0")
    stage.do(Tick())
    assert set(stage.core.cluster.workers) == {"d0"}


def test_a_scheduler_that_stood_still_itself_removes_no_worker_for_it() -> None:
    stage = Stage(silence_timeout_s=3.0, worker_lease_s=10.0)
    for worker_id in ("p0", "d0", "d1"):
        stage.enter(worker_id)
    stage.now_s += 20.0
    # The first words that were waiting for it are of one worker; the others' come behind its own tick.
    stage.report("p0")
    stage.do(Tick(late_s=19.9))
    assert {one.worker_id for one in stage.core.cluster.workers.values() if not one.silent} == {"p0", "d0", "d1"}
    # From now on everybody's silence counts again.
    stage.now_s += 10.0
    stage.report("p0")
    stage.do(Tick())
    assert set(stage.core.cluster.workers) == {"p0"}
