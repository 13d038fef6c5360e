"""Ejection and return, as a table of what happens and how the worker stands then; and what the core makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.api.actions import DropWorker, PublishView, ReplyWaiting
from scheduler.api.events import RequestEnded, Tick, WorkerLeft, WorkerSuspected
from scheduler.cluster.outlier_detector import Standing, WorkerHealth
from scheduler.config import OutlierLimits
from tests.scheduler.cast import FRONT, Stage, question, where

CONFIG = OutlierLimits(
    failures_in_a_row=3, failure_ratio=0.5, requests_min=8, window_s=1000.0, ejection_s=5.0, ejection_max_s=30.0
)


def play(event_log: str) -> WorkerHealth:
    """``+`` a success, ``-`` a failure (which ejects where it should), ``p`` a probe, ``P`` its success, ``c`` its
    cancellation, a number that many seconds."""
    health, now_s = WorkerHealth(CONFIG), 0.0
    for word in event_log.split():
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
    ("event_log", "standing", "avoided"),
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
def test_a_sequence_of_outcomes_ends_in_a_standing(event_log: str, standing: str, avoided: bool) -> None:
    health = play(event_log)
    assert (health.standing.value, health.avoided) == (standing, avoided)


def test_one_probe_decides_and_others_that_had_to_go_there_do_not() -> None:
    health = play("- - - 5")
    for plan_id in (7, 8):
        health.planned((1, plan_id))
    health.ended((1, 8))
    assert health.avoided, "there is no room for a second probe"
    standings = []
    for plan_id in (8, 7):
        health.succeeded((1, plan_id), 6.0)
        standings.append(health.standing)
    assert standings == [Standing.PROBATION, Standing.IN_SERVICE]


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


def test_the_only_worker_stays() -> None:
    assert suspect(stage("d0"), "d0", 20) == []


def test_when_no_other_is_there_an_ejected_worker_is_used() -> None:
    made = stage("d0", "d1", suspect_cooldown_s=0.001)
    suspect(made, "d0")
    made.do(WorkerLeft(session=made.session_of["d1"], worker_id="d1", reason="gone"))
    made.now_s = 1.0
    assert chosen(made) == {"d0"}


def test_requests_wait_for_a_worker_in_service_rather_than_go_to_an_ejected_one() -> None:
    made = stage("d0", "d1", waiting_max=1, suspect_cooldown_s=0.001)
    suspect(made, "d0")
    made.plan(1600)
    assert isinstance(made.do(question(902, prompt_tokens=1600))[0], ReplyWaiting)


def test_coming_back_does_not_make_a_worker_better() -> None:
    made = stage("d0", "d1")
    suspect(made, "d0")
    made.do(WorkerLeft(session=made.session_of["d0"], worker_id="d0", reason="cut"))
    made.enter("d0")
    assert made.core.cluster.workers["d0"].avoided


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
