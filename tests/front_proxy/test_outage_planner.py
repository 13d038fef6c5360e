"""Planning from the last picture, one sentence each."""

from __future__ import annotations

from typing import Any

from front_proxy.outage_planner import SESSION, OutagePlanner, PlannerReply

from runtime.failures import FailureKind
from scheduler.actions import Placement, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.config import SchedulerConfig
from scheduler.events import PlanRequested, RunningPlan
from scheduler.outliers import Standing
from tests.scheduler.cast import facts, ready, where


def planner(*running: RunningPlan, **loads: Any) -> OutagePlanner:
    made = OutagePlanner(SchedulerConfig(), running=running, load_fade_s=10.0, rng=None, now_s=100.0)
    made.show([(facts(worker_id), load) for worker_id, load in loads.items()], 100.0, 100.0)
    return made


def ask(made: OutagePlanner, plan_id: int, now_s: float = 100.0, **changes: Any) -> PlannerReply:
    question: dict[str, Any] = {"request_id": f"r{plan_id}", "prompt_tokens": 64, "output_tokens_max": 32, **changes}
    replies = made.plan(PlanRequested(session=SESSION, plan_id=plan_id, **question), now_s)
    made.check()
    (reply,) = (reply for reply in replies if reply.plan_id == plan_id)
    return reply


def test_it_chooses_as_the_scheduler_would() -> None:
    made = planner(p0=ready(prefill_tokens_queued=5000), p1=ready(), d0=ready(kv_blocks_used=90), d1=ready())
    reply = ask(made, 1)
    assert isinstance(reply, ReplyPlan) and where(reply) == ("p1", "d1", "remote")
    assert made.plans_made == 1


def test_what_runs_already_and_what_it_places_is_reserved_until_it_ends() -> None:
    old = RunningPlan(plan_id=1, request_id="r1", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=90)
    made = planner(old, d0=ready())
    assert made.reserved_blocks == {"d0": 90}
    assert isinstance(ask(made, 2), ReplyPlan)
    assert isinstance(ask(made, 3, prompt_tokens=10 * 32), ReplyWaiting) and made.waiting == {3}
    (placed,) = made.ended(1, "finished", 0, 100.0)
    assert isinstance(placed, ReplyPlan) and placed.plan_id == 3 and not made.waiting
    assert made.ended(1, "finished", 0, 100.0) == []
    assert isinstance(ask(made, 4, prompt_tokens=10 * 32), ReplyPlan)


def test_the_load_that_was_seen_loses_its_weight() -> None:
    made = planner(d0=ready(kv_blocks_used=99))
    assert isinstance(ask(made, 1), ReplyWaiting)
    assert isinstance(ask(made, 2, now_s=105.0), ReplyPlan) and not made.waiting
    assert isinstance(ask(made, 3, now_s=110.0, prompt_tokens=85 * 32), ReplyPlan)


def test_no_pace_of_a_worker_is_learnt_from_a_load_that_only_fades() -> None:
    """Of 2000 tokens that waited, few seem computed from one look to the next: that must turn nobody away."""
    made = planner(p0=ready(prefill_tokens_queued=2000), d0=ready())
    for plan_id in range(1, 40):
        now_s = 100.0 + 0.1 * plan_id
        reply = ask(made, plan_id, now_s)
        assert isinstance(reply, ReplyPlan) and where(reply) == ("p0", "d0", "remote")
        made.ended(plan_id, "finished", 0, now_s)


def test_a_worker_that_could_not_be_used_is_avoided() -> None:
    made = planner(d0=ready(), d1=ready())
    made.suspect("d0", 1, "lost", 100.0)
    for plan_id in range(1, 6):
        reply = ask(made, plan_id)
        assert isinstance(reply, ReplyPlan) and where(reply)[1] == "d1"


def test_what_was_seen_long_ago_counts_nothing_and_not_less_than_nothing() -> None:
    made = planner(p0=ready(prefill_tokens_queued=5000), p1=ready(), d0=ready())
    replies = [ask(made, plan_id, now_s=1000.0) for plan_id in range(1, 5)]
    assert {where(reply)[0] for reply in replies if isinstance(reply, ReplyPlan)} == {"p0", "p1"}


def test_requests_that_were_seen_running_are_believed_to_end() -> None:
    made = OutagePlanner(SchedulerConfig(), running=(), load_fade_s=10.0, rng=None, now_s=100.0)
    made.show([(facts("d0", requests_max=1), ready(requests_running=1))], 100.0, 100.0)
    assert isinstance(ask(made, 1), ReplyWaiting)
    (placed,) = made.look(105.0)
    assert isinstance(placed, ReplyPlan) and placed.plan_id == 1


def test_a_picture_of_an_older_start_says_nothing_of_the_newer_one() -> None:
    made = planner()
    for epoch, load in ((2, ready()), (1, ready(kv_blocks_used=99))):
        made.show([(facts("d0", epoch=epoch), load)], 100.0, 100.0)
    reply = ask(made, 1)
    assert isinstance(reply, ReplyPlan) and reply.decode is not None and reply.decode.epoch == 2


def test_a_worker_that_is_shown_again_keeps_what_is_reserved_on_it() -> None:
    made = planner(d0=ready())
    ask(made, 1)
    made.show([(facts("d0"), ready())], 101.0, 101.0)
    assert made.reserved_blocks == {"d0": 3}
    made.ended(1, "finished", 0, 101.0)
    assert made.reserved_blocks == {"d0": 0}


def test_a_new_start_of_a_worker_replaces_the_old_one() -> None:
    old = RunningPlan(plan_id=1, request_id="r1", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=90)
    made = planner(old, d0=ready())
    made.show([(facts("d0", epoch=2), ready())], 101.0, 101.0)
    assert made.reserved_blocks == {"d0": 0}
    reply = ask(made, 2, 101.0)
    assert isinstance(reply, ReplyPlan) and reply.decode is not None and reply.decode.epoch == 2


def test_who_waits_is_refused_when_his_wait_is_over_and_places_of_those_let_go_are_nobodys() -> None:
    old = RunningPlan(plan_id=1, request_id="r1", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=99)
    made = planner(old, d0=ready())
    assert isinstance(ask(made, 2, wait_max_s=3.0), ReplyWaiting)
    assert made.look(102.9) == []
    (over,) = made.look(103.0)
    assert isinstance(over, ReplyRefusal) and over.failure.kind is FailureKind.EXHAUSTED
    assert isinstance(ask(made, 3, 103.0), ReplyWaiting)
    assert made.let_go([old], 103.0) == [3] and not made.waiting
    made.check()
    assert made.reserved_blocks == {"d0": 99} and made.ended(1, "finished", 0, 103.0) == []


def test_a_worker_that_was_ejected_in_an_outage_comes_back_on_trial_and_for_good_when_it_does_well() -> None:
    made = planner(d0=ready(), d1=ready(), d2=ready())
    for _ in range(5):
        made.suspect("d0", 1, "failed", 100.0)
    used: dict[float, set[str]] = {}
    plan_id = 0
    for now_s in (101.0, 110.0, 120.0):
        for _ in range(60):
            plan_id += 1
            reply = ask(made, plan_id, now_s)
            assert isinstance(reply, ReplyPlan) and reply.decode is not None
            used.setdefault(now_s, set()).add(reply.decode.worker_id)
            made.ended(plan_id, "finished", 1, now_s)
    assert used == {101.0: {"d1"}, 110.0: {"d0"}, 120.0: {"d0"}}, "without chance, the first one that may be used"
    assert made._core.cluster.workers["d0"].health.standing is Standing.IN_SERVICE


def test_however_long_nobody_asks_no_worker_falls_silent_and_no_reservation_is_dropped() -> None:
    old = RunningPlan(plan_id=1, request_id="r1", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=90)
    made = planner(old, d0=ready(), d1=ready())
    for now_s in (101.0, 5000.0, 5000.1, 9000.0):
        made.look(now_s)
        made.check()
        assert made.reserved_blocks == {"d0": 90, "d1": 0}
        assert not any(worker.silent for worker in made._core.cluster.workers.values())


def test_who_waits_here_and_gets_a_place_from_the_scheduler_waits_no_more() -> None:
    old = RunningPlan(plan_id=1, request_id="r1", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=99)
    made = planner(old, d0=ready(), d1=ready(kv_blocks_used=99))
    assert isinstance(ask(made, 2), ReplyWaiting)
    granted = RunningPlan(plan_id=2, request_id="r2", prefill=None, decode=Placement("d1", "d1:1", 1), decode_blocks=3)
    assert made.take_over((granted,), 100.0) == [] and not made.waiting
    made.check()
    assert made.reserved_blocks == {"d0": 99, "d1": 3}
