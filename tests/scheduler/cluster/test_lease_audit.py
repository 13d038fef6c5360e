"""What is held is compared with what runs: a planted leak is named, reservations for nothing are dropped."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.api.actions import Action, ReportDropped, ReportLeak
from scheduler.api.events import Tick, WorkerLeasesReported, WorkerLeft
from scheduler.cluster.lease_audit import LeaseAuditor
from tests.scheduler.cast import Stage, question, ready, restarted


def stage(**config: Any) -> Stage:
    made = Stage(**{"leak_after_s": 10.0, "ledger_interval_s": 2.0, "worker_lease_s": 1e9, **config})
    made.enter("p0")
    made.enter("d0")
    return made


def hold(made: Stage, *lease_ids: str) -> None:
    made.do(WorkerLeasesReported(session=made.session_of["p0"], worker_id="p0", lease_ids=lease_ids))


def at(made: Stage, now_s: float) -> list[Action]:
    """What is found then, with the workers busy."""
    made.now_s = now_s
    busy = ready(requests_running=1)
    made.report("p0", busy)
    made.report("d0", busy)
    return [action for action in made.do(Tick()) if isinstance(action, ReportLeak | ReportDropped)]


def test_a_lease_that_no_request_uses_is_found_once_and_its_request_named() -> None:
    made = stage()
    plan = made.plan()
    hold(made, "r1-p1", "cmpl-77-x-p2")
    assert at(made, 2.0) == []
    assert at(made, 11.9) == []
    (leak,) = at(made, 13.9)
    assert isinstance(leak, ReportLeak)
    assert (leak.worker_id, leak.lease_id, leak.request_id) == ("p0", "cmpl-77-x-p2", "cmpl-77-x")
    assert made.core.leaked_leases() == {"p0": 1, "d0": 0}
    assert at(made, 20.0) == []
    made.end(plan)
    assert at(made, 22.0) == [], "a release takes a moment"
    hold(made)
    at(made, 24.0)
    assert made.core.leaked_leases() == {"p0": 0, "d0": 0}


def test_a_worker_that_left_leaks_nothing() -> None:
    made = stage()
    hold(made, "lost-p1")
    at(made, 2.0)
    assert len(at(made, 20.0)) == 1
    made.do(WorkerLeft(session=made.session_of["p0"], worker_id="p0", reason="gone"))
    assert made.core.leaked_leases() == {"d0": 0}


def test_a_lease_that_is_known_again_is_no_leak() -> None:
    auditor = LeaseAuditor(10.0)
    assert auditor.look("p0", ["r-p1"], set(), 0.0) == []
    assert auditor.look("p0", ["r-p1"], {"r"}, 9.0) == []
    assert auditor.look("p0", ["r-p1"], set(), 11.0) == []
    assert [leak.request_id for leak in auditor.look("p0", ["r-p1"], set(), 21.0)] == ["r"]


def test_a_plan_on_idle_workers_is_dropped_when_it_is_old_enough_and_not_before() -> None:
    made = stage()
    for now_s in (10.0, 20.0):
        made.now_s = now_s
        made.report("p0")
        made.report("d0")
    made.plan()
    for now_s, reserved in ((20.0, 3), (29.9, 3), (31.9, 0)):
        made.now_s = now_s
        made.do(Tick())
        assert made.reserved("d0") == reserved, now_s


@pytest.mark.parametrize(("busy", "idle"), [("p0", "d0"), ("d0", "p0")])
@pytest.mark.parametrize("work", [{"requests_running": 1}, {"requests_waiting": 1}, {"leases_held": 1}], ids=str)
def test_a_plan_one_of_whose_workers_has_anything_at_all_to_do_stays(
    busy: str, idle: str, work: dict[str, int]
) -> None:
    made = stage()
    made.plan()
    for now_s in (1.0, 20.0, 40.0):
        made.now_s = now_s
        made.report(busy, ready(**work))
        made.report(idle)
        assert made.do(Tick()) == []
    assert made.reserved("d0") == 3


def test_a_lease_of_a_request_that_waits_for_a_place_is_no_leak() -> None:
    made = stage(waiting_max=1)
    made.plan(prompt_tokens=97 * 32)
    made.do(question(9, request_id="again", wait_max_s=1000.0, priority_class="batch"))
    hold(made, "again-p1")
    assert at(made, 2.0) == at(made, 14.0) == []
    assert sum(made.core.waiting().values()) == 1


def test_what_a_new_scheduler_has_not_been_told_yet_is_no_leak() -> None:
    made = restarted(leak_after_s=1.0, ledger_interval_s=0.5, recovery_grace_s=5.0, worker_lease_s=1e9)
    made.enter("p0")
    made.enter("d0")
    hold(made, "r1-p1")
    assert at(made, 2.0) == at(made, 4.0) == at(made, 5.0) == []
    assert len(at(made, 6.0)) == 1


def test_what_is_held_is_compared_no_more_often_than_configured() -> None:
    made = stage()
    assert at(made, 2.0) == []
    hold(made, "lost-p1")
    assert at(made, 3.9) == at(made, 4.0) == at(made, 12.0) == at(made, 13.9) == []
    (leak,) = at(made, 14.0)
    assert isinstance(leak, ReportLeak) and leak.unknown_for_s == 10.0
