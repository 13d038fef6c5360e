"""Planning from the last picture, one sentence each."""

from __future__ import annotations

from typing import Any

from front_proxy.outage_planner import SESSION, OutagePlanner
from runtime.failures import FailureKind
from scheduler.actions import Placement, ReplyPlan, ReplyRefusal
from scheduler.config import SchedulerConfig
from scheduler.events import PlanRequested, RunningPlan
from tests.scheduler.cast import facts, ready, where


def planner(*running: RunningPlan, **loads: Any) -> OutagePlanner:
    made = OutagePlanner(SchedulerConfig(), running=running, load_fade_s=10.0, rng=None, now_s=100.0)
    made.show([(facts(worker_id), load) for worker_id, load in loads.items()], 100.0, 100.0)
    return made


def ask(made: OutagePlanner, plan_id: int, now_s: float = 100.0, **changes: Any) -> ReplyPlan | ReplyRefusal:
    question: dict[str, Any] = {"request_id": f"r{plan_id}", "prompt_tokens": 64, "output_tokens_max": 32, **changes}
    reply = made.plan(PlanRequested(session=SESSION, plan_id=plan_id, **question), now_s)
    made.check()
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
    refused = ask(made, 3, prompt_tokens=10 * 32)
    assert isinstance(refused, ReplyRefusal) and refused.failure.kind is FailureKind.EXHAUSTED
    made.ended(1, 0, 100.0)
    made.ended(1, 0, 100.0)
    assert isinstance(ask(made, 4, prompt_tokens=10 * 32), ReplyPlan)


def test_the_load_that_was_seen_loses_its_weight() -> None:
    made = planner(d0=ready(kv_blocks_used=99))
    assert isinstance(ask(made, 1), ReplyRefusal)
    assert isinstance(ask(made, 2, now_s=105.0), ReplyPlan)
    assert isinstance(ask(made, 3, now_s=110.0, prompt_tokens=90 * 32), ReplyPlan)


def test_no_pace_of_a_worker_is_learnt_from_a_load_that_only_fades() -> None:
    """Of 2000 tokens that waited, few seem computed from one look to the next: that must turn nobody away."""
    made = planner(p0=ready(prefill_tokens_queued=2000), d0=ready())
    for plan_id in range(1, 40):
        now_s = 100.0 + 0.1 * plan_id
        reply = ask(made, plan_id, now_s)
        assert isinstance(reply, ReplyPlan) and where(reply) == ("p0", "d0", "remote")
        made.ended(plan_id, 0, now_s)


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
    assert isinstance(ask(made, 1), ReplyRefusal)
    assert isinstance(ask(made, 2, now_s=105.0), ReplyPlan)


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
    made.ended(1, 0, 101.0)
    assert made.reserved_blocks == {"d0": 0}


def test_a_new_start_of_a_worker_replaces_the_old_one() -> None:
    old = RunningPlan(plan_id=1, request_id="r1", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=90)
    made = planner(old, d0=ready())
    made.show([(facts("d0", epoch=2), ready())], 101.0, 101.0)
    assert made.reserved_blocks == {"d0": 0}
    reply = ask(made, 2, 101.0)
    assert isinstance(reply, ReplyPlan) and reply.decode is not None and reply.decode.epoch == 2
