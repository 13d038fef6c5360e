"""Plans from the last view, one sentence each."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from front_proxy.planning.cluster_view import ClusterView, WorkerEntry
from front_proxy.planning.fallback_planner import SESSION, FallbackPlanner
from scheduler.api.actions import Placement, ReplyRefusal
from scheduler.api.events import RunningPlan
from scheduler.api.worker_info import WorkerLoad
from scheduler.cluster.outlier_detector import Standing
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from tests.scheduler.cast import ready, worker_info
from tests.support.plan_client import QUESTION

OLD = RunningPlan(plan_id=1, request_id="r1", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=90)


def show(made: FallbackPlanner, now_s: float, epoch: int = 1, **loads: WorkerLoad) -> None:
    """What a scheduler that is recovering says."""
    made.view_changed(
        [WorkerEntry(worker_info(worker_id, epoch=epoch), load) for worker_id, load in loads.items()], now_s
    )


def planner(*running: RunningPlan, **loads: WorkerLoad) -> FallbackPlanner:
    """In an outage that began at 100 s."""
    view = ClusterView()
    made = FallbackPlanner(SchedulerConfig(), view, view_max_age_s=1e9, load_fade_s=10.0, rng=random.Random(7))
    for plan in running:
        made.granted(plan, 90.0)
    change = view.apply([WorkerEntry(worker_info(worker_id), load) for worker_id, load in loads.items()])
    made.view_changed(change.told, 100.0)
    made.begin(100.0)
    view.knows_more = True
    made.check()
    return made


def core(made: FallbackPlanner) -> SchedulerCore:
    assert made._core is not None
    return made._core


def reserved(made: FallbackPlanner) -> dict[str, int]:
    return {worker.worker_id: worker.reserved_blocks for worker in core(made).cluster.workers.values()}


def ask(made: FallbackPlanner, plan_id: int, now_s: float = 100.0, **changes: Any) -> RunningPlan | ReplyRefusal:
    planned = made.plan(msgspec.structs.replace(QUESTION, plan_id=plan_id, request_id=f"r{plan_id}", **changes), now_s)
    made.check()
    return planned


def placed(made: FallbackPlanner, plan_id: int, now_s: float = 100.0, **changes: Any) -> tuple[str, str]:
    """Where it runs."""
    planned = ask(made, plan_id, now_s, **changes)
    assert isinstance(planned, RunningPlan), planned
    return (planned.prefill.worker_id if planned.prefill else "", planned.decode.worker_id if planned.decode else "")


def test_it_chooses_as_the_scheduler_would() -> None:
    made = planner(p0=ready(prefill_tokens_queued=5000), p1=ready(), d0=ready(kv_blocks_used=90), d1=ready())
    assert placed(made, 1) == ("p1", "d1")
    assert made.resume() == 1 and not made.active


def test_what_runs_already_and_what_it_places_is_reserved_until_it_ends() -> None:
    made = planner(OLD, d0=ready())
    assert reserved(made) == {"d0": 90}
    assert placed(made, 2)
    assert isinstance(ask(made, 3, prompt_tokens=10 * 32), ReplyRefusal)
    made.ended(1, "finished", 0, 100.0)
    made.ended(1, "finished", 0, 100.0)
    assert placed(made, 3, prompt_tokens=10 * 32)
    assert set(made.running) == {2, 3}


def test_the_load_that_was_seen_loses_its_weight() -> None:
    made = planner(d0=ready(kv_blocks_used=99))
    assert isinstance(ask(made, 1), ReplyRefusal)
    assert placed(made, 2, now_s=105.0)
    assert placed(made, 3, now_s=110.0, prompt_tokens=85 * 32)


def test_no_pace_of_a_worker_is_learnt_from_a_load_that_only_fades() -> None:
    """Of 2000 tokens that waited, few seem computed from one look to the next: that must turn no request away."""
    made = planner(p0=ready(prefill_tokens_queued=2000), d0=ready())
    for plan_id in range(1, 40):
        now_s = 100.0 + 0.1 * plan_id
        assert placed(made, plan_id, now_s) == ("p0", "d0")
        made.ended(plan_id, "finished", 0, now_s)


def test_what_was_seen_long_ago_counts_nothing_and_not_less_than_nothing() -> None:
    made = planner(p0=ready(prefill_tokens_queued=5000), p1=ready(), d0=ready())
    assert {placed(made, plan_id, now_s=1000.0)[0] for plan_id in range(1, 5)} == {"p0", "p1"}


def test_a_worker_that_is_shown_again_keeps_its_reservations_and_a_new_start_of_it_has_none() -> None:
    made = planner(OLD, d0=ready())
    show(made, 101.0, d0=ready())
    assert reserved(made) == {"d0": 90}
    show(made, 101.0, epoch=2, d0=ready())
    assert reserved(made) == {"d0": 0}
    # An older view, of the start before.
    show(made, 101.0, epoch=1, d0=ready(kv_blocks_used=99))
    planned = ask(made, 2, 101.0)
    assert isinstance(planned, RunningPlan) and planned.decode is not None and planned.decode.epoch == 2


def test_a_worker_that_was_ejected_in_an_outage_comes_back_on_trial_and_for_good_when_it_does_well() -> None:
    made = planner(d0=ready(), d1=ready(), d2=ready())
    for _ in range(5):
        made.suspect("d0", 1, "failed", 100.0)
    used: dict[float, set[str]] = {}
    plan_id = 0
    for now_s in (101.0, 110.0, 120.0):
        for _ in range(60):
            plan_id += 1
            used.setdefault(now_s, set()).add(placed(made, plan_id, now_s)[1])
            made.ended(plan_id, "finished", 1, now_s)
    assert "d0" not in used[101.0] and "d0" in used[110.0] and "d0" in used[120.0]
    assert core(made).cluster.workers["d0"].health.standing is Standing.IN_SERVICE


def test_however_long_no_request_comes_no_worker_falls_silent_and_no_reservation_is_dropped() -> None:
    made = planner(OLD, d0=ready(), d1=ready())
    for plan_id, now_s in enumerate((101.0, 5000.0, 5000.1, 9000.0), start=2):
        ask(made, plan_id, now_s)
        made.ended(plan_id, "finished", 0, now_s)
        assert reserved(made) == {"d0": 90, "d1": 0}
        assert not any(worker.silent for worker in core(made).cluster.workers.values())
        assert core(made).fronts[SESSION].plans.keys() == {1}


def test_it_names_ranks_and_their_loads_fade_too() -> None:
    view = ClusterView()
    made = FallbackPlanner(SchedulerConfig(), view, view_max_age_s=1e9, load_fade_s=10.0, rng=random.Random(7))
    load = ready(kv_blocks_used=50, ranks=(ready(kv_blocks_used=50), ready()))
    change = view.apply([WorkerEntry(worker_info("d0", ranks=2), load)])
    made.view_changed(change.told, 100.0)
    made.begin(100.0)
    first = ask(made, 1)
    assert isinstance(first, RunningPlan) and first.decode is not None and first.decode.rank == 1
    made.plan(msgspec.structs.replace(QUESTION, plan_id=2), 105.0)
    assert [rank.load.kv_blocks_used for rank in core(made).cluster.workers["d0"].ranks] == [25, 0]
    for rank in (0, 1):
        pinned = ask(made, 3 + rank, 105.0, pinned_decode_worker_id=f"d0#{rank}")
        assert isinstance(pinned, RunningPlan) and pinned.decode is not None
        assert (pinned.prefill, pinned.decode.rank) == (None, rank)
