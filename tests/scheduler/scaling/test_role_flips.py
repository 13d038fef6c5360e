"""Changes of role: which workers may change, what is wanted of each, and what an older registration is worth."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.roles import WorkerRole
from scheduler.api.actions import Action, DropWorker, FlipWorker, RejectWorker, ReplyPlan, ReplyWaiting
from scheduler.api.events import FlipRequested, PlanRequested, Tick, WorkerJoined, WorkerLeft
from scheduler.api.worker_info import WorkerState
from tests.scheduler.cast import FRONT, Stage, ready, worker_info


class Play(Stage):
    """Two workers of each role, that are ready."""

    def __init__(self) -> None:
        super().__init__(flip_timeout_s=60.0, flip_answer_s=10.0)
        for name in ("p0", "p1", "d0", "d1"):
            self.join(name)
            self.report(name)

    def flip(self, name: str, role: WorkerRole) -> list[FlipWorker]:
        return told(self.do(FlipRequested(worker_id=name, role=role)))

    def again(self, name: str, role: WorkerRole, registration: int, session: int = 0) -> list[Action]:
        """The worker registers again on its stream, or on another one."""
        info = worker_info(name, role, registration=registration)
        member = self.core.cluster.get(name)
        return self.do(WorkerJoined(session=session or (member.session if member else 77), info=info))

    def role(self, name: str) -> tuple[str, bool]:
        member = self.core.cluster.workers[name]
        return member.role, member.ready

    def objection(self, name: str, role: WorkerRole) -> str:
        return self.core.flip_objection(name, role) or ""

    def plan(self, number: int) -> list[Action]:
        return self.do(
            PlanRequested(
                session=FRONT, plan_id=number, request_id=f"r{number}", prompt_tokens=300, output_tokens_max=100
            )
        )


def told(actions: list[Action]) -> list[FlipWorker]:
    return [action for action in actions if isinstance(action, FlipWorker)]


def test_a_worker_that_changes_gets_nothing_until_it_registered_again() -> None:
    play = Play()
    (command,) = play.flip("p0", "decode")
    assert (command.worker_id, command.role, command.timeout_s) == ("p0", "decode", 60.0)
    assert play.role("p0") == ("prefill", False)
    assert play.core.cluster.workers["p0"].state is WorkerState.DRAINING
    actions = play.again("p0", "decode", 1)
    assert not told(actions) and not [each for each in actions if isinstance(each, DropWorker)]
    play.report("p0")
    assert play.role("p0") == ("decode", True)
    assert [each.worker_id for each in play.core.cluster.pool_for_requests().with_role("decode")] == ["d0", "d1", "p0"]


def test_it_keeps_what_is_known_of_its_speed_and_its_health() -> None:
    play = Play()
    before = play.core.cluster.workers["p0"]
    play.flip("p0", "decode")
    play.again("p0", "decode", 1)
    after = play.core.cluster.workers["p0"]
    assert (after.latency, after.health) == (before.latency, before.health)


def test_what_was_planned_for_the_older_registration_reserves_nothing() -> None:
    play = Play()
    placed = [play.plan(number) for number in range(8)]
    plans = [action for actions in placed for action in actions if isinstance(action, ReplyPlan)]
    on_d0 = sum(action.decode is not None and action.decode.worker_id == "d0" for action in plans)
    assert on_d0
    play.flip("d0", "prefill")
    play.again("d0", "prefill", 1)
    play.report("d0")
    play.flip("d0", "decode")
    play.again("d0", "decode", 2)
    assert play.core.cluster.workers["d0"].reserved_blocks == 0
    assert play.core.plans_in_flight == len(plans)


def test_the_last_decode_worker_stays_one_whatever_is_asked_at_once() -> None:
    play = Play()
    assert play.flip("d0", "prefill")
    assert "last decode worker" in play.objection("d1", "prefill")
    assert not play.flip("d1", "prefill")
    assert "already" in play.objection("d0", "prefill")
    # All prefill workers may go: decode workers compute prompts too.
    assert play.flip("p0", "decode")
    assert play.flip("p1", "decode")


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.DRAINING])
def test_a_worker_that_is_not_ready_does_not_change(state: WorkerState) -> None:
    play = Play()
    play.report("p0", ready().__class__(state=state))
    assert "only a worker that is ready" in play.objection("p0", "decode")


def test_a_worker_has_its_role_already() -> None:
    play = Play()
    assert not play.objection("p0", "prefill")
    assert not play.flip("p0", "prefill")
    assert play.role("p0") == ("prefill", True)


def test_a_change_that_took_too_long_is_over_and_not_tried_again() -> None:
    play = Play()
    play.flip("p0", "decode")
    # The same role and registration, on the same stream.
    assert not told(play.again("p0", "prefill", 0))
    play.report("p0")
    assert play.role("p0") == ("prefill", True)
    assert "p0" not in play.core.flips.wanted


def test_a_worker_that_does_not_answer_serves_again() -> None:
    play = Play()
    play.flip("p0", "decode")
    play.now_s = 69.0
    for name in ("p0", "p1", "d0", "d1"):
        play.report(name)
    play.do(Tick())
    assert play.role("p0") == ("prefill", False)
    play.now_s = 71.0
    play.do(Tick())
    assert play.role("p0") == ("prefill", True)
    # Late, it has the other role all the same.
    play.again("p0", "decode", 1)
    assert play.role("p0")[0] == "decode"


def test_a_stream_that_breaks_meanwhile_is_told_again_on_the_next() -> None:
    play = Play()
    play.flip("p0", "decode")
    (command,) = told(play.again("p0", "prefill", 0, session=50))
    assert command.session == 50
    # Also where the scheduler noticed the break.
    play.do(WorkerLeft(session=50, worker_id="p0", reason="broke"))
    (command,) = told(play.again("p0", "prefill", 0, session=51))
    assert command.session == 51
    assert not told(play.again("p0", "decode", 1, session=52))
    assert play.role("p0")[0] == "decode"


def test_a_worker_that_is_started_again_takes_the_role_that_was_wanted() -> None:
    play = Play()
    play.flip("p0", "decode")
    play.again("p0", "decode", 1)
    (command,) = told(play.join("p0", "prefill", epoch=2))
    assert (command.worker_id, command.role) == ("p0", "decode")
    assert not play.role("p0")[1]


def test_it_does_not_where_no_decode_worker_would_be_left() -> None:
    play = Play()
    play.flip("d0", "prefill")
    play.again("d0", "prefill", 1)
    play.report("d0")
    play.do(WorkerLeft(session=play.core.cluster.workers["d1"].session, worker_id="d1", reason="died"))
    assert not told(play.join("d0", "decode", epoch=2))


@pytest.mark.parametrize("changes", [{"registration": 0, "role": "decode"}, {"registration": 1, "kv_blocks_total": 7}])
def test_nothing_else_changes_in_an_epoch(changes: dict[str, Any]) -> None:
    play = Play()
    info = worker_info("p0", **changes)
    (refused,) = play.do(WorkerJoined(session=90, info=info))
    assert isinstance(refused, RejectWorker)
    assert "without a new epoch" in refused.failure.message


def test_an_older_registration_is_refused() -> None:
    play = Play()
    play.again("p0", "decode", 1)
    (refused,) = play.do(WorkerJoined(session=90, info=worker_info("p0")))
    assert isinstance(refused, RejectWorker)


def test_a_new_scheduler_takes_what_workers_say() -> None:
    play = Play()
    play.join("x", "decode", registration=3)
    assert not told(play.join("y", "prefill", registration=4))
    assert play.role("x")[0] == "decode"


def test_requests_wait_for_no_worker_that_changes() -> None:
    play = Play()
    play.flip("p0", "decode")
    for number in range(6):
        (action,) = [each for each in play.plan(number) if isinstance(each, ReplyPlan | ReplyWaiting)]
        assert isinstance(action, ReplyPlan)
        assert action.prefill is None or action.prefill.worker_id == "p1"
