"""Ejection and return, as a table of what happens and how the worker stands then; and what the core makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.actions import BlameRequest, DropWorker, EjectWorker, PublishView, ReplyPlan, ReplyWaiting
from scheduler.config import OutlierConfig, WaitingConfig
from scheduler.events import PlanRequested, RequestEnded, Tick, WorkerLeft, WorkerSuspected
from scheduler.outliers import FailedRequests, Standing, WorkerHealth
from tests.scheduler.cast import FRONT, Stage, ready, where

CONFIG = OutlierConfig(
    failures_in_a_row=3, failure_ratio=0.5, requests_min=8, window_s=1000.0, ejection_s=5.0, ejection_max_s=30.0
)


def play(story: str) -> WorkerHealth:
    """``+`` a success, ``-`` a failure (which ejects where it should), ``p`` a probe, ``P`` its success, ``c`` its
    cancellation, a number that many seconds."""
    health, now_s = WorkerHealth(CONFIG), 0.0
    for word in story.split():
        match word:
            case "+":
                health.succeeded((1, 1), now_s)
            case "-":
                if health.failed(now_s):
                    health.eject(now_s)
            case "p":
                health.planned((1, 7))
            case "P":
                health.succeeded((1, 7), now_s)
            case "c":
                health.ended((1, 7))
            case _:
                now_s += float(word)
                health.look(now_s)
    return health


@pytest.mark.parametrize(
    ("story", "standing", "avoided"),
    [
        ("", "in_service", False),
        ("- -", "in_service", False),
        ("- - + - -", "in_service", False),
        ("- - -", "ejected", True),
        ("- - - + + +", "ejected", True),
        ("+ + + + - - + -", "in_service", False),
        ("+ + - - + - - + -", "ejected", True),
        ("- - - 4.9", "ejected", True),
        ("- - - 5", "probation", False),
        ("- - - 5 +", "probation", False),
        ("- - - 5 p", "probation", True),
        ("- - - 5 p c", "probation", False),
        ("- - - 5 p P", "in_service", False),
        ("- - - 5 p P - -", "in_service", False),
        ("- - - 5 -", "ejected", True),
        ("- - - 5 p - 9.9", "ejected", True),
        ("- - - 5 p - 10", "probation", False),
        ("- - - 5 - 10 - 20 - 29.9", "ejected", True),
        ("- - - 5 - 10 - 20 - 30", "probation", False),
        ("- - - 5 p P 9 - - - 10", "probation", False),
        ("- - - 5 p P 11 + - - - 5", "probation", False),
        ("- - - 5 p P 1 + - - - 5", "ejected", True),
        # Back only since 9: that was too short to be well again.
        ("- - - 5 4 p P 3 + - - - 5", "ejected", True),
        # What began before it was ejected says nothing new.
        ("- - - 1 - 4", "probation", False),
        ("- - - 5 p - 9 P", "ejected", True),
        # Exactly the share that is too much.
        ("+ - + - + - + -", "ejected", True),
        # What happened long ago does not count, good or bad.
        ("+ + - + - + - + - + - + + - + - + - + 9999 + -", "in_service", False),
        ("+ + + + 9999 + - - + - - + - -", "ejected", True),
    ],
)
def test_a_story_ends_as_told(story: str, standing: str, avoided: bool) -> None:
    health = play(story)
    assert (health.standing.value, health.avoided) == (standing, avoided)


def on_probation() -> WorkerHealth:
    health = play("- - - 5")
    health.planned((1, 7))
    return health


def test_one_probe_decides_and_others_that_had_to_go_there_do_not() -> None:
    health = on_probation()
    health.planned((1, 8))
    standings = []
    for key in ((1, 8), (1, 7)):
        health.succeeded(key, 6.0)
        standings.append(health.standing)
    assert standings == [Standing.PROBATION, Standing.IN_SERVICE]


def test_the_end_of_another_request_does_not_make_room_for_a_second_probe() -> None:
    health = on_probation()
    health.ended((1, 1))
    assert health.avoided
    health.ended((1, 7))
    assert not health.avoided


def stage(*worker_ids: str, **config: Any) -> Stage:
    made = Stage(**config)
    for worker_id in worker_ids:
        made.enter(worker_id)
    return made


def suspect(made: Stage, worker_id: str, times: int = 5) -> list[Any]:
    return [
        action
        for _ in range(times)
        for action in made.do(WorkerSuspected(worker_id=worker_id, epoch=1, reason="it stalled"))
    ]


def chosen(made: Stage, times: int = 6) -> set[str | None]:
    return {where(made.plan())[1] for _ in range(times)}


def fail(made: Stage, request_id: str, *worker_ids: str) -> list[Any]:
    """One request fails inside the engines of these workers, one after the other."""
    return [
        action
        for worker_id in worker_ids
        for action in made.do(WorkerSuspected(worker_id=worker_id, epoch=1, reason="broke", request_id=request_id))
    ]


def test_requests_that_fail_wherever_they_run_eject_nobody() -> None:
    made = stage("d0", "d1", "d2")
    for number in range(20):
        assert fail(made, f"r{number}", "d0", "d1", "d2", "d0") == [BlameRequest(request_id=f"r{number}")]
        assert all(worker.health.standing is Standing.IN_SERVICE for worker in made.core.cluster.workers.values())
        # Nor is anybody avoided for a while, which would leave all work to the others.
        assert all(worker.suspect_until_s <= made.now_s for worker in made.core.cluster.workers.values())
        made.now_s += 0.1


def test_what_one_request_does_to_a_worker_counts_once_and_what_several_do_counts_for_each() -> None:
    made = stage("d0", "d1")
    assert fail(made, "one", *["d0"] * 20) == []
    assert [bool(fail(made, f"r{number}", "d0")) for number in range(4)] == [False, False, False, True]


def test_a_worker_that_is_out_for_a_failure_which_was_not_its_own_is_back_at_once() -> None:
    made = stage("d0", "d1", suspect_cooldown_s=0.001)
    suspect(made, "d0", 4)
    assert fail(made, "poison", "d0") == [EjectWorker(worker_id="d0", for_s=5.0), PublishView(at_once=True)]
    made.now_s = 1.0
    assert chosen(made) == {"d1"}
    assert fail(made, "poison", "d1") == [BlameRequest(request_id="poison"), PublishView(at_once=True)]
    assert "d0" in chosen(made)
    # One of its own is still one too many, and then it is out for as long as for the first time.
    assert suspect(made, "d0", 1) == [EjectWorker(worker_id="d0", for_s=5.0), PublishView(at_once=True)]


def test_a_probe_that_fails_everywhere_says_nothing_about_the_worker_on_trial() -> None:
    made = stage("d0", "d1", suspect_cooldown_s=0.001)
    suspect(made, "d0")
    made.now_s = 2.9
    made.report("d0")
    made.report("d1")
    made.now_s = 5.0
    made.do(Tick())
    health = made.core.cluster.workers["d0"].health
    assert fail(made, "poison", "d0") == [EjectWorker(worker_id="d0", for_s=10.0), PublishView(at_once=True)]
    fail(made, "poison", "d1")
    assert health.standing is Standing.PROBATION and not health.avoided


def test_a_failure_before_a_success_is_not_taken_from_the_failures_after_it() -> None:
    health, other = WorkerHealth(CONFIG), WorkerHealth(CONFIG)
    failed = FailedRequests(CONFIG)
    health.failed(0.0)
    failed.count("poison", health.last_failure(0.0))
    health.succeeded((1, 1), 0.0)
    assert [health.failed(1.0), health.failed(1.0)] == [False, False]
    (excused,) = failed.judge("poison", other, 2.0) or ()
    assert not health.take_back(excused, 2.0)
    assert health.failed(3.0), "two and one are three in a row"


def test_on_probation_only_the_failure_that_ended_it_is_taken_back() -> None:
    health = WorkerHealth(CONFIG)
    older = []
    for now_s in (0.0, 1.0):
        assert not health.failed(now_s)
        older.append(health.last_failure(now_s))
    assert health.failed(2.0) and health.eject(2.0) == 5.0
    assert health.look(7.0) and health.failed(8.0)
    cause = health.last_failure(8.0)
    assert health.eject(8.0) == 10.0
    assert not health.failed(8.0)
    late = health.last_failure(8.0)
    assert not any(health.take_back(each, 9.0) for each in (*older, late))
    assert (health.avoided, health.look(17.9)) == (True, False)
    assert (health.take_back(cause, 17.9), health.avoided) == (True, False)
    assert health.failed(18.0) and health.eject(18.0) == 10.0, "it was the second, and is so again"


def test_failed_requests_are_remembered_in_bounded_number_and_for_a_bounded_time() -> None:
    health, other = WorkerHealth(CONFIG), WorkerHealth(CONFIG)
    config = OutlierConfig(failed_requests_max=3, failed_request_age_s=10.0)
    failed = FailedRequests(config)

    def count(request_id: str, now_s: float) -> None:
        assert failed.judge(request_id, health, now_s) is None
        failed.count(request_id, health.last_failure(now_s))

    for number in range(5):
        count(f"r{number}", 0.0)
        assert len(failed) == min(number + 1, 3)
    assert failed.judge("r0", other, 1.0) is None, "forgotten for later ones"
    assert failed.judge("r4", other, 9.9) is not None
    assert failed.judge("r3", other, 10.0) is None, "too long ago"
    assert failed.judge("r4", other, 19.8) == (), "who failed again is remembered from then on"
    assert len(failed) == 1


def test_a_worker_that_answers_health_checks_but_not_requests_is_ejected_and_returns_on_trial() -> None:
    made = stage("d0", "d1", suspect_cooldown_s=0.001)
    assert suspect(made, "d0") == [EjectWorker(worker_id="d0", for_s=5.0), PublishView(at_once=True)]
    assert made.core.cluster.workers["d0"].unusable == "ejected"
    made.now_s = 1.0
    assert chosen(made) == {"d1"}
    made.report("d0")
    made.report("d1")
    made.now_s = 5.0
    assert made.do(Tick()) == [PublishView(at_once=True)]
    plans = [made.plan() for _ in range(6)]
    probes = [plan for plan in plans if where(plan)[1] == "d0"]
    assert len(probes) == 1, "one request is let through"
    made.do(RequestEnded(session=FRONT, plan_id=probes[0].plan_id, outcome="finished"))
    assert made.core.cluster.workers["d0"].health.standing is Standing.IN_SERVICE
    assert "d0" in chosen(made)


def test_a_probe_that_says_nothing_makes_room_for_another() -> None:
    made = stage("d0", "d1", suspect_cooldown_s=0.001)
    suspect(made, "d0")
    made.now_s = 2.9
    made.report("d0")
    made.report("d1")
    made.now_s = 5.0
    made.do(Tick())
    for _ in range(3):
        probe = next(plan for plan in (made.plan() for _ in range(6)) if where(plan)[1] == "d0")
        made.do(RequestEnded(session=FRONT, plan_id=probe.plan_id, outcome="cancelled"))
        assert made.core.cluster.workers["d0"].health.standing is Standing.PROBATION


def test_most_of_a_pool_stays() -> None:
    made = stage("d0", "d1", "d2", suspect_cooldown_s=0.001)
    assert suspect(made, "d0")
    assert suspect(made, "d1", 20) == []
    assert stage_alone() == []


def stage_alone() -> list[Any]:
    return suspect(stage("d0"), "d0", 20)


def test_when_nobody_else_is_there_an_ejected_worker_is_used() -> None:
    made = stage("d0", "d1", suspect_cooldown_s=0.001)
    suspect(made, "d0")
    made.do(WorkerLeft(session=made.session_of["d1"], worker_id="d1", reason="gone"))
    made.now_s = 1.0
    assert chosen(made) == {"d0"}


def test_requests_wait_for_a_worker_in_service_rather_than_go_to_an_ejected_one() -> None:
    made = stage("d0", "d1", waiting=WaitingConfig(), suspect_cooldown_s=0.001)
    suspect(made, "d0")
    made.plan(1600)
    held: dict[str, Any] = {"request_id": "r", "prompt_tokens": 1600, "output_tokens_max": 32}
    assert isinstance(made.do(PlanRequested(session=FRONT, plan_id=902, **held))[0], ReplyWaiting)


def test_coming_back_does_not_make_a_worker_better_but_a_new_start_does() -> None:
    made = stage("d0", "d1")
    suspect(made, "d0")
    made.do(WorkerLeft(session=made.session_of["d0"], worker_id="d0", reason="cut"))
    made.enter("d0")
    assert made.core.cluster.workers["d0"].avoided
    made.do(WorkerLeft(session=made.session_of["d0"], worker_id="d0", reason="restarted"))
    made.enter("d0", epoch=2)
    assert not made.core.cluster.workers["d0"].avoided


def test_a_silent_worker_gets_nothing_new_until_it_speaks_and_is_gone_when_its_lease_ran_out() -> None:
    made = stage("d0", "d1", silence_timeout_s=3.0, worker_lease_s=10.0)
    made.now_s = 2.5
    made.report("d1")
    made.now_s = 3.0
    assert made.do(Tick()) == [PublishView(at_once=True)]
    assert made.core.cluster.workers["d0"].unusable == "silent"
    assert chosen(made) == {"d1"}
    assert made.report("d0") == [PublishView(at_once=True)]
    assert chosen(made, 20) == {"d0", "d1"}
    made.now_s = 12.9
    made.report("d1")
    made.do(Tick())
    assert made.core.cluster.get("d0") is not None
    made.now_s = 13.0
    assert any(isinstance(action, DropWorker) for action in made.do(Tick()))


def test_requests_wait_for_a_silent_worker_where_there_is_no_other() -> None:
    made = stage("d0", waiting=WaitingConfig(), silence_timeout_s=3.0)
    made.now_s = 3.0
    made.do(Tick())
    (reply,) = made.do(PlanRequested(session=FRONT, plan_id=1, request_id="r", prompt_tokens=64, output_tokens_max=32))
    assert isinstance(reply, ReplyWaiting)
    assert any(isinstance(action, ReplyPlan) for action in made.report("d0", ready()))
