"""The plan client's decisions as a table: what becomes of a question, of a stream, and of time that passes."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from front_proxy.planning.events import (
    AnswerPlan,
    AnswerRefusal,
    Dial,
    Leave,
    OutageBegan,
    OutageOver,
    PlanEnded,
    SendEnd,
    SendQuestion,
    SendRunning,
    SendSuspect,
    StreamDialled,
    Suspected,
    TimerFired,
    ViewChanged,
    ViewShown,
)
from runtime.failures import FailureKind
from scheduler.api.worker_info import WorkerState
from scheduler.config import SchedulerConfig
from tests.front_proxy.plan_client_play import (
    BIG,
    BUSY,
    CONFIG,
    EMPTY,
    LIMITS,
    QUESTION,
    REBUILDING,
    USABLE,
    Anything,
    Play,
    entry,
    granted,
    only,
    queue_reply,
)

# From the last time that it was asked: the wait for its turn, and what a scheduler that is back is given.
LONGEST_S = SchedulerConfig().waiting.default.wait_max_s + CONFIG.plan_timeout_s + 1.0


def never(it: Play) -> None:
    pass


def opened(it: Play) -> None:
    it.open(USABLE)


def silent(it: Play) -> None:
    it.open(USABLE)
    it.ask()
    it.wait(0.5)
    it.do(PlanEnded(1, "finished", 0))


def recovering(it: Play) -> None:
    it.open(USABLE)
    it.lose()
    it.open(REBUILDING)


def away(it: Play) -> None:
    it.open(USABLE)
    it.lose()


def away_for_long(it: Play) -> None:
    away(it)
    it.wait(100.1)


def opened_and_unusable(it: Play) -> None:
    it.open(EMPTY)


def rebuilding_and_unusable(it: Play) -> None:
    it.open(ViewShown([entry("d0"), entry("d1", WorkerState.DRAINING)]))
    it.hear(ViewShown([entry("d0", WorkerState.DRAINING)], recovering=True))


def silent_for_long(it: Play) -> None:
    silent(it)
    it.wait(100.1)


@pytest.mark.parametrize(
    ("before", "becomes"),
    [
        (never, "waits"),
        (opened, "sent"),
        (opened_and_unusable, "sent"),
        (silent, "planned"),
        (silent_for_long, "waits"),
        (recovering, "planned"),
        (rebuilding_and_unusable, "sent"),
        (away, "planned"),
        (away_for_long, "waits"),
    ],
)
def test_what_becomes_of_a_question(before: Callable[[Play], None], becomes: str) -> None:
    it = Play()
    before(it)
    plan_id, actions = it.ask()
    assert [action.plan_id for action in only(actions, SendQuestion)] == ([plan_id] if becomes == "sent" else [])
    assert not only(actions, AnswerPlan), "not before the one who asks knows its plan's id"
    soon = only(it.wait(0.0), AnswerPlan)
    assert [(answer.plan.plan_id, answer.local) for answer in soon] == (
        [(plan_id, True)] if becomes == "planned" else []
    )
    if becomes == "waits":
        (refusal,) = only(it.wait(5.0), AnswerRefusal)
        assert refusal.failure.kind is FailureKind.UNAVAILABLE and not refusal.local
    assert it.plan_client.unanswered == (1 if becomes == "sent" else 0)


def test_a_question_that_is_given_up_is_ended_behind_it_and_the_scheduler_is_silent_then() -> None:
    it = Play()
    it.open(USABLE)
    both = [it.ask()[0] for _ in range(2)]
    actions = it.wait(0.5)
    assert [type(action) for action in actions] == [OutageBegan, SendEnd, AnswerPlan, SendEnd, AnswerPlan]
    assert [(action.plan_id, action.outcome) for action in only(actions, SendEnd)] == [
        (plan_id, "failed") for plan_id in both
    ], "the second one too, though nothing else is sent to one that is silent"
    assert only(actions, OutageBegan)[0].why == "silent"
    assert (it.plan_client.connected, it.plan_client.degraded) == (False, True)
    assert it.do(PlanEnded(both[0], "finished", 1)) == []
    assert it.do(Suspected("d0", 1, "it broke")) == []
    told, over = it.hear(granted(both[1]))
    assert isinstance(told, SendRunning) and told.complete
    assert [plan.plan_id for plan in told.plans] == [both[1]]
    assert over == OutageOver(2)
    assert (it.plan_client.connected, it.plan_client.degraded) == (True, False)
    assert it.do(Suspected("d0", 1, "it broke")) == [SendSuspect("d0", 1, "it broke")]


def test_what_a_silent_scheduler_was_asked_is_ended_there_and_not_asked_again() -> None:
    it = Play()
    it.open(BUSY)
    resumed = msgspec.structs.replace(BIG, resumed=True)
    stays, leaves = it.ask(resumed)[0], it.ask(resumed)[0]
    assert [type(action) for action in it.wait(0.5)] == [OutageBegan]
    assert not it.plan_client.connected and it.plan_client.unanswered == 2, "nobody has room, here or there"
    assert it.do(PlanEnded(leaves, "cancelled", 0)) == [SendEnd(leaves, "cancelled", 0)]
    told, over = it.hear(None)
    assert isinstance(told, SendRunning) and told.asked == (stays,)
    assert over == OutageOver(0)
    assert it.wait(0.4) == [], "it has its time to answer again"
    (answer,) = it.hear(granted(stays))
    assert isinstance(answer, AnswerPlan) and not answer.local


def test_who_asked_before_the_scheduler_came_back_is_planned_here_if_that_is_rebuilding_and_else_asked() -> None:
    it = Play()
    away(it)
    it.ask()
    assert only(it.open(REBUILDING), SendQuestion) == []
    assert only(it.wait(0.0), AnswerPlan)
    it = Play()
    away(it)
    it.ask()
    assert only(it.open(USABLE), SendQuestion) == []
    assert only(it.wait(0.0), SendQuestion)
    it = Play()
    it.open(ViewShown([entry("d0"), entry("d1", WorkerState.DRAINING)]))
    it.lose()
    it.ask()
    it.open(ViewShown([entry("d0", WorkerState.DRAINING)], recovering=True))
    assert only(it.wait(0.0), SendQuestion), "it is recovering, but nobody here is better off"


def test_without_a_view_to_plan_from_the_scheduler_gets_all_of_the_timeout() -> None:
    it = Play()
    it.open(EMPTY)
    plan_id, _ = it.ask()
    assert it.wait(4.9) == [] and it.plan_client.connected, "it has nobody to name, and may just be late"
    end, refusal = it.wait(0.1)
    assert end == SendEnd(plan_id, "failed", 0)
    assert isinstance(refusal, AnswerRefusal) and refusal.failure.kind is FailureKind.UNAVAILABLE
    assert "reachable" not in refusal.failure.message


def test_patience_is_never_longer_than_the_timeout() -> None:
    it = Play(plan_timeout_s=0.2)
    it.open(EMPTY)
    it.ask()
    assert only(it.wait(0.2), AnswerRefusal)


def test_who_is_told_to_wait_waits_so_long_and_not_for_ever() -> None:
    it = Play()
    it.open(USABLE)
    plan_id, _ = it.ask()
    assert it.hear(queue_reply(plan_id, 3.0), queue_reply(77, 3.0)) == []
    assert it.wait(3.4) == []
    assert [answer.local for answer in only(it.wait(0.1), AnswerPlan)] == [True]
    refused = Play()
    refused.open(EMPTY)
    plan_id, _ = refused.ask()
    refused.hear(queue_reply(plan_id, 3.0))
    assert refused.wait(7.9) == [] and only(refused.wait(0.1), AnswerRefusal)


def test_what_could_not_be_asked_of_a_silent_scheduler_is_asked_when_it_speaks() -> None:
    it = Play(view_max_age_s=1.0)
    it.open(USABLE)
    it.ask()
    it.wait(0.5)
    it.wait(1.1)
    plan_id, actions = it.ask()
    assert actions == [] and not it.plan_client.connected
    told, *_ = it.hear(USABLE)
    assert isinstance(told, SendRunning) and told.asked == (plan_id,)
    assert it.wait(0.0) == [SendQuestion(msgspec.structs.replace(QUESTION, plan_id=plan_id))]


@pytest.mark.parametrize(("after_s", "planned"), [(100.0, True), (100.1, False)])
def test_the_view_grows_old_from_the_moment_the_scheduler_was_last_there(after_s: float, planned: bool) -> None:
    it = Play()
    it.open(USABLE)
    it.wait(5000.0)
    it.lose()
    it.wait(after_s)
    it.ask()
    assert bool(only(it.wait(0.0), AnswerPlan)) is planned


def test_the_view_of_an_idle_cluster_is_old_and_still_true_when_its_scheduler_falls_silent() -> None:
    it = Play()
    it.open(USABLE)
    it.wait(LIMITS.degraded_view_max_age_s + 1.0)
    it.ask()
    assert only(it.wait(LIMITS.plan_patience_s), AnswerPlan)


def test_a_view_grows_old_while_its_scheduler_is_silent() -> None:
    it = Play()
    silent(it)
    it.wait(90.0)
    it.lose()
    it.wait(10.1)
    it.ask()
    assert not only(it.wait(0.0), AnswerPlan), "that the stream was open meanwhile says nothing"


def test_a_scheduler_that_comes_back_to_itself_is_not_believed_before_it_knows_everybody() -> None:
    it = Play()
    it.open(ViewShown([entry("d0"), entry("d1")]))
    it.lose()
    assert it.open(ViewShown([entry("d0", WorkerState.STARTING)], recovering=True))[-1] == ViewChanged([])
    assert it.view.snapshot.usable, "who has only registered anew is what it was"
    plan_id, actions = it.ask()
    assert actions == []
    began, told, answer = it.wait(0.0)
    assert began == OutageBegan("recovering", 0.0)
    assert isinstance(told, SendRunning) and not told.complete and told.plans[0].plan_id == plan_id
    assert isinstance(answer, AnswerPlan)
    assert it.hear(ViewShown([entry("d0")], recovering=True)) == [ViewChanged([])]
    changed, over = it.hear(ViewShown([entry("d0"), entry("d1")], recovering=True))
    assert changed == ViewChanged([]) and over == OutageOver(1)
    assert it.ask()[1][0] == SendQuestion(msgspec.structs.replace(QUESTION, plan_id=plan_id + 1))


def test_what_the_scheduler_grants_in_an_outage_is_reserved_by_its_planner() -> None:
    it = Play()
    it.open(ViewShown([entry("d0")]))
    asked, _ = it.ask()
    it.hear(ViewShown([], recovering=True))
    it.ask()
    it.wait(0.0)
    assert it.plan_client.degraded
    it.hear(granted(asked, blocks=95))
    big = msgspec.structs.replace(QUESTION, prompt_tokens=320)
    it.ask(big)
    assert only(it.wait(0.0), AnswerRefusal)[0].local
    it.do(PlanEnded(asked, "finished", 1))
    it.ask(big)
    assert only(it.wait(0.0), AnswerPlan)[0].local


def test_whom_the_scheduler_did_not_use_is_not_used_without_it_either() -> None:
    it = Play()
    it.open(ViewShown([entry("d0", unusable="ejected"), entry("d1")]))
    it.lose()
    for _ in range(5):
        it.ask()
        (answer,) = only(it.wait(0.0), AnswerPlan)
        assert answer.plan.decode is not None and answer.plan.decode.worker_id == "d1"


def test_workers_that_could_not_be_used_in_an_outage_are_avoided() -> None:
    it = Play()
    it.open(ViewShown([entry("d0"), entry("d1")]))
    it.lose()
    it.ask()
    it.wait(0.0)
    it.do(Suspected("d0", 1, "lost"))
    for _ in range(5):
        it.ask()
        (answer,) = only(it.wait(0.0), AnswerPlan)
        assert answer.plan.decode is not None and answer.plan.decode.worker_id == "d1"


def test_who_is_not_in_a_view_any_more_is_told() -> None:
    it = Play()
    it.open(ViewShown([entry("d0"), entry("p0")]))
    assert it.hear(ViewShown([entry("d0", epoch=2)])) == [ViewChanged([("d0", 1), ("p0", 1)])]


def test_what_runs_is_told_from_time_to_time_but_not_to_a_silent_scheduler() -> None:
    it = Play()
    it.open(USABLE)
    runs, _ = it.ask()
    it.hear(granted(runs))
    told = it.wait(25.0)
    assert [(len(action.plans), action.complete) for action in only(told, SendRunning)] == [(1, True)] * 2
    it.ask()
    it.wait(0.5)
    assert only(it.wait(30.0), SendRunning) == []
    it.lose()
    assert only(it.wait(30.0), SendRunning) == []


def test_pauses_grow_to_a_bound_and_begin_anew_after_a_stream_that_was_served() -> None:
    it = Play()
    for longest_s in (0.1, 0.2, 0.4, 0.4):
        (dial,) = it.lose("refused")
        assert isinstance(dial, Dial) and longest_s / 2 <= dial.after_s <= longest_s
        it.do(StreamDialled())
    it.hear(USABLE)
    (dial,) = only(it.lose(), Dial)
    assert dial.after_s <= 0.1


def test_when_the_leader_of_several_dies_all_that_it_served_pause_first() -> None:
    it = Play(addresses="a,b")
    it.open(ViewShown([entry("d0")]))
    (dial,) = only(it.lose(), Dial)
    assert dial.address == "b" and dial.after_s > 0.0
    it.wait(20.0)
    assert it.plan_client.wake_s == float("inf"), "there is nothing to tell and nobody to look at"


def test_a_leader_older_than_one_that_was_heard_is_left_and_not_believed() -> None:
    it = Play(addresses="a,b")
    it.do(StreamDialled())
    it.hear(USABLE, leader_epoch=8)
    plan_id, _ = it.ask()
    assert it.hear(granted(plan_id), leader_epoch=7) == [Leave("it led once, and another one leads now")]
    assert it.plan_client.unanswered == 1
    lost = it.lose("it led once")
    assert [answer.local for answer in only(lost, AnswerPlan)] == [True]
    assert only(lost, Dial)[0].address == "b"
    it.do(StreamDialled())
    (leave,) = it.hear(EMPTY, leader_epoch=7)
    assert isinstance(leave, Leave) and not it.plan_client.connected, "on another stream no more than on that one"
    assert it.view.snapshot.usable


def test_who_is_new_to_a_scheduler_that_is_rebuilding_is_planned_to_in_the_outage() -> None:
    it = Play()
    away(it)
    it.ask()
    it.wait(0.0)
    it.open(ViewShown([entry("d1")], recovering=True))
    it.do(Suspected("d0", 1, "lost"))
    it.ask()
    (answer,) = only(it.wait(0.0), AnswerPlan)
    assert answer.local and answer.plan.decode is not None and answer.plan.decode.worker_id == "d1"


def test_waking_up_too_early_or_too_often_changes_nothing() -> None:
    it = Play()
    it.open(USABLE)
    it.ask()
    assert it.do(TimerFired()) == it.do(TimerFired()) == []
    assert it.wait(0.4) == []


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_every_question_is_answered_once_and_in_time(seed: int) -> None:
    all_of_it = Anything(seed)
    for _ in range(400):
        all_of_it.step()
        plan_client, now_s = all_of_it.it.plan_client, all_of_it.it.now_s
        assert set(plan_client.running) == all_of_it.running and plan_client.unanswered == len(all_of_it.waiting)
        assert all(now_s <= since_s + LONGEST_S for since_s in all_of_it.waiting.values())
