"""Random events against the scheduler's core: what it keeps adds up whatever happens, and ends empty."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.api import actions, events
from scheduler.api.actions import Placement
from scheduler.api.events import Event
from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from tests.scheduler.cast import worker_info

WORKERS = ("p0", "p1", "d0", "d1", "d2")
worker_ids = st.sampled_from(WORKERS)
sessions = st.integers(1, 8)
fronts = st.integers(1, 3)
epochs = st.integers(1, 3)
loads = st.builds(
    WorkerLoad,
    state=st.sampled_from((WorkerState.READY, WorkerState.READY, WorkerState.READY, WorkerState.DRAINING)),
    kv_blocks_used=st.integers(0, 60),
    requests_running=st.integers(0, 4),
    prefill_tokens_queued=st.integers(0, 2000),
)
joins = st.builds(
    lambda session, worker_id, epoch, layout: events.WorkerJoined(
        session=session, info=worker_info(worker_id, epoch=epoch, layout_fingerprint=layout, kv_blocks_total=50)
    ),
    sessions, worker_ids, epochs, st.sampled_from(("same", "same", "same", "other")),
)  # fmt: skip
plans = st.builds(
    events.PlanRequested,
    session=fronts,
    plan_id=st.integers(1, 30),
    request_id=st.just("r"),
    prompt_tokens=st.integers(1, 1800),
    output_tokens_max=st.integers(1, 600),
    excluded_worker_ids=st.frozensets(worker_ids, max_size=2),
    pinned_decode_worker_id=st.none() | worker_ids,
    prefill_only=st.booleans(),
    resumed=st.booleans(),
)
placements = st.none() | st.builds(
    lambda worker_id, epoch: Placement(worker_id, f"{worker_id}:1", epoch), worker_ids, epochs
)
running_plans = st.builds(
    events.RunningPlan,
    plan_id=st.integers(1, 30),
    request_id=st.just("r"),
    prefill=placements,
    decode=placements,
    decode_blocks=st.integers(0, 60),
)
anything: st.SearchStrategy[Event] = st.one_of(
    joins,
    st.builds(events.WorkerLoadReported, session=sessions, worker_id=worker_ids, load=loads),
    st.builds(events.WorkerLeft, session=sessions, worker_id=worker_ids, reason=st.just("test")),
    st.builds(events.WorkerSuspected, worker_id=worker_ids, epoch=epochs, reason=st.just("test")),
    st.builds(events.DrainRequested, worker_id=worker_ids),
    st.builds(events.FrontJoined, session=fronts, front_proxy_id=st.just("front")),
    st.builds(events.FrontLeft, session=fronts),
    plans,
    plans,
    st.builds(
        events.PlansRunning,
        session=fronts,
        plans=st.lists(running_plans, max_size=4).map(tuple),
        asked=st.frozensets(st.integers(1, 30), max_size=4),
        complete=st.booleans(),
    ),
    st.builds(events.RequestEnded, session=fronts, plan_id=st.integers(1, 30)),
    st.just(events.Tick()),
)


@settings(max_examples=300)
@given(steps=st.lists(st.tuples(st.floats(0.0, 1.0), anything), max_size=80))
def test_the_invariants_hold_under_any_events(steps: list[tuple[float, Event]]) -> None:
    core = SchedulerCore(SchedulerParameters(worker_lease_s=3.0, plans_in_flight_max=20), began_s=0.0)
    now_s = 0.0
    for session, worker_id in enumerate(WORKERS, start=1):
        core.handle(events.WorkerJoined(session=session, info=worker_info(worker_id, kv_blocks_total=50)), now_s)
        ready = WorkerLoad(state=WorkerState.READY)
        core.handle(events.WorkerLoadReported(session=session, worker_id=worker_id, load=ready), now_s)
    core.handle(events.FrontJoined(session=1, front_proxy_id="front"), now_s)
    for elapsed_s, event in steps:
        now_s += elapsed_s
        match event:
            case events.FrontJoined(session=session) if session in core.fronts:
                continue
            case (
                events.FrontLeft(session=session)
                | events.PlanRequested(session=session)
                | events.PlansRunning(session=session)
            ) if session not in core.fronts:
                continue
        for action in core.handle(event, now_s):
            if isinstance(action, actions.ReplyPlan):
                for placement in (action.prefill, action.decode):
                    if placement is not None:
                        worker = core.cluster.workers[placement.worker_id]
                        assert worker.ready
                        assert worker.info.epoch == placement.epoch
                assert action.prefill or action.decode
                assert (action.decode_blocks_reserved > 0) == (action.decode is not None)
        core.check()
    for session in list(core.fronts):
        core.handle(events.FrontLeft(session=session), now_s)
    core.check()
    assert core.plans_in_flight == 0
    assert all(worker.reserved_blocks == 0 for worker in core.cluster.workers.values())
