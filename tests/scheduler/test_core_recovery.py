"""A scheduler that was away, or cut off, learns from the other processes what runs, and removes no worker for it."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.api.actions import Action, Placement, PublishView, ReportDropped
from scheduler.api.events import FrontJoined, FrontLeft, PlansRunning, RequestEnded, RunningPlan, Tick, WorkerLeft
from tests.scheduler.cast import FRONT, Stage, question, restarted


def running(plan_id: int, decode: str | None = "d0", *, blocks: int = 3, epoch: int = 1) -> RunningPlan:
    return RunningPlan(
        plan_id=plan_id,
        request_id=f"r{plan_id}",
        prefill=Placement("p0", "p0:1", 1),
        decode=Placement(decode, f"{decode}:1", epoch) if decode else None,
        decode_blocks=blocks,
    )


def tell(
    stage: Stage, *plans: RunningPlan, complete: bool = False, asked: frozenset[int] = frozenset()
) -> list[Action]:
    return stage.do(PlansRunning(session=FRONT, plans=plans, complete=complete, asked=asked))


def entered(*worker_ids: str, **config: Any) -> Stage:
    stage = Stage(**config)
    for worker_id in worker_ids:
        stage.enter(worker_id)
    return stage


def leave(stage: Stage, *worker_ids: str) -> None:
    for worker_id in worker_ids:
        stage.do(WorkerLeft(session=stage.session_of[worker_id], worker_id=worker_id, reason="cut"))


def tick(stage: Stage, now_s: float, *heard: str) -> list[Action]:
    """A look at ``now_s``, just after these workers were heard."""
    stage.now_s = now_s
    for worker_id in heard:
        stage.report(worker_id)
    return stage.do(Tick())


def waiting(stage: Stage) -> int:
    return sum(stage.core.waiting().values())


def test_a_plan_that_another_made_is_reserved_and_ends_like_any_other() -> None:
    stage = restarted()
    stage.enter("d0")
    tell(stage, running(1), running(2))
    assert stage.reserved("d0") == 6
    tell(stage, running(1))
    assert stage.reserved("d0") == 6, "said again, it is known"
    assert tell(stage, running(2), complete=True) == [ReportDropped(request_id="r1", reason="not_running")]
    assert stage.reserved("d0") == 3, "what a complete list leaves out is over"
    stage.do(FrontLeft(session=FRONT))
    assert stage.reserved("d0") == 0 == stage.core.plans_in_flight


@pytest.mark.parametrize("planned_at", ["d0", "d1", None])
def test_a_waiting_request_that_its_front_proxy_planned_itself_gets_no_second_plan(planned_at: str | None) -> None:
    stage = Stage(waiting_max=1)
    stage.enter("p0")
    for worker_id in ("d0", "d1"):
        stage.enter(worker_id, requests_max=1)
    first = [stage.plan() for _ in range(2)]
    stage.do(question(50))
    assert waiting(stage) == 1
    tell(stage, running(50, planned_at), complete=True, asked=frozenset(plan.plan_id for plan in first))
    assert waiting(stage) == 0
    for plan in first:
        stage.end(plan)
    assert stage.core.plans_in_flight == 1
    stage.do(RequestEnded(session=FRONT, plan_id=50))
    assert stage.core.plans_in_flight == stage.reserved("d0") == stage.reserved("d1") == 0


def test_a_front_proxy_on_a_second_stream_reserves_once_while_the_first_has_not_ended_here() -> None:
    stage = Stage(waiting_max=1)
    stage.enter("p0")
    stage.enter("d0", requests_max=2)
    plans = [stage.plan() for _ in range(2)]
    stage.do(question(50))
    assert waiting(stage) == 1
    again = FRONT + 1
    stage.do(FrontJoined(session=again, front_proxy_id="front-0"))
    stage.do(FrontJoined(session=again + 1, front_proxy_id="front-1"))
    told = tuple(running(plan.plan_id, blocks=plan.decode_blocks_reserved) for plan in plans)
    before = stage.reserved("d0")
    stage.do(PlansRunning(session=again, plans=told, complete=True, asked=frozenset({50})))
    assert (stage.reserved("d0"), stage.core.plans_in_flight) == (before, 2)
    assert waiting(stage) == 0, "it is about to ask again on the new one"
    stage.do(PlansRunning(session=FRONT, plans=told, complete=True))
    assert stage.core.plans_in_flight == 2, "said on the first one before it was lost"
    stage.end(plans[0])
    stage.do(FrontLeft(session=FRONT))
    assert (stage.reserved("d0"), stage.core.plans_in_flight) == (before, 2)
    stage.do(FrontLeft(session=again))
    assert stage.reserved("d0") == 0 == stage.core.plans_in_flight


def test_what_one_process_says_takes_nothing_from_another_one_of_its_id() -> None:
    stage = Stage(waiting_max=1)
    stage.enter("d0", requests_max=1)
    first, second = FRONT + 1, FRONT + 2
    for session in (first, second):
        stage.do(FrontJoined(session=session, front_proxy_id="web", incarnation=session))
    for plan_id in (1, 2):
        stage.do(question(plan_id, session=first))
    stage.do(PlansRunning(session=second, plans=(), complete=True))
    assert (stage.core.plans_in_flight, waiting(stage)) == (1, 1)
    stage.do(FrontJoined(session=second + 1, front_proxy_id="web", incarnation=first))
    stage.do(PlansRunning(session=second + 1, plans=(), complete=True))
    assert (stage.core.plans_in_flight, waiting(stage)) == (0, 0)


def test_a_question_on_its_way_is_not_taken_for_an_end() -> None:
    stage = entered("d0")
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


def test_more_than_a_worker_has_is_never_reserved_and_more_plans_than_may_be_are_not_taken_over() -> None:
    stage = restarted(plans_in_flight_max=2)
    stage.enter("d0")
    tell(stage, *(running(plan_id, blocks=80) for plan_id in range(1, 5)))
    assert (stage.reserved("d0"), stage.core.plans_in_flight) == (100, 2)
    tell(stage, complete=True)
    assert stage.reserved("d0") == 0


def test_a_worker_whose_stream_broke_finds_its_reservations_again() -> None:
    stage = entered("p0", "d0")
    plan = stage.plan()
    leave(stage, "d0")
    stage.enter("d0")
    assert stage.reserved("d0") == 3
    stage.end(plan)
    assert stage.reserved("d0") == 0


def test_after_all_peers_were_lost_it_recovers_as_after_a_start() -> None:
    """Its network was cut: the first peers that return know of workers that it does not know yet."""
    stage = entered("p0", "d0", "d1", recovery_grace_s=3.0, worker_lease_s=10.0)
    tick(stage, 100.0)
    leave(stage, "p0", "d0", "d1")
    stage.do(FrontLeft(session=FRONT))
    stage.do(FrontJoined(session=FRONT + 1, front_proxy_id="front-0"))
    careful = [stage.core.recovering]
    stage.now_s = 102.0
    stage.enter("d0")
    tick(stage, 109.0, "d0")
    careful.append(stage.core.recovering)
    assert PublishView(at_once=True) in tick(stage, 110.0)
    assert [*careful, stage.core.recovering] == [True, True, False]


def test_after_isolation_it_recovers_whichever_peer_returns_first() -> None:
    """It was cut off: it hears all at once that they left it, while some are back already."""
    stage = entered("d0", "d1", recovery_grace_s=3.0, silence_timeout_s=3.0, worker_lease_s=10.0)
    for now_s in (4.0, 5.0):
        tick(stage, now_s)
    stage.do(FrontJoined(session=FRONT + 1, front_proxy_id="front-1"))
    leave(stage, "d0", "d1")
    assert stage.core.recovering
    tick(stage, 15.0)
    assert not stage.core.recovering


@pytest.mark.parametrize("returning", ["worker", "front proxy"])
def test_one_peer_that_returns_to_the_others_changes_nothing(returning: str) -> None:
    stage = entered("p0", "d0", recovery_grace_s=3.0)
    tick(stage, 100.0, "p0", "d0")
    leave(stage, "d0")
    if returning == "worker":
        stage.enter("d0")
    else:
        stage.do(FrontLeft(session=FRONT))
        stage.do(FrontJoined(session=FRONT + 1, front_proxy_id="front-0"))
    assert not stage.core.recovering


def test_no_worker_is_removed_while_all_are_silent() -> None:
    stage = entered("p0", "d0", "d1", silence_timeout_s=3.0, worker_lease_s=10.0)
    for now_s in range(61):
        tick(stage, float(now_s))
    assert set(stage.core.cluster.workers) == {"p0", "d0", "d1"}
    # One is heard again: each has the whole of its lease to speak up, and then those that do not are gone.
    for now_s in range(60, 70):
        tick(stage, float(now_s), "d0")
    assert set(stage.core.cluster.workers) == {"p0", "d0", "d1"}
    tick(stage, 71.0, "d0")
    assert set(stage.core.cluster.workers) == {"d0"}


def test_a_scheduler_that_stood_still_itself_removes_no_worker_for_it() -> None:
    stage = entered("p0", "d0", "d1", silence_timeout_s=3.0, worker_lease_s=10.0)
    stage.now_s += 20.0
    # The first words that were waiting for it are of one worker; the others' come behind its own tick.
    stage.report("p0")
    stage.do(Tick(late_s=19.9))
    assert not any(worker.silent for worker in stage.core.cluster.workers.values())
    # From now on every silence counts again.
    tick(stage, 30.0, "p0")
    assert set(stage.core.cluster.workers) == {"p0"}
