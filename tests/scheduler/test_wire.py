"""What the scheduler says arrives as it was meant. The front proxies' half is in tests/front_proxy/dispatch/."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.failures import Failure, FailureKind
from runtime.roles import WORKER_ROLES
from scheduler import wire
from scheduler.api.actions import ReplyRefusal
from scheduler.api.worker_info import LoadCost, WorkerInfo, WorkerLoad, WorkerState
from tests.scheduler.cast import worker, worker_info

COUNTS = st.integers(0, 2**32 - 1)
INFOS = st.builds(
    WorkerInfo,
    role=st.sampled_from(WORKER_ROLES),
    **{
        name: {int: COUNTS, float: st.floats(0.0, 1e6), str: st.text(max_size=9)}[type(value)]
        for name, value in msgspec.structs.asdict(worker_info("d0")).items()
        if name != "role"
    },
)
LOADS = st.builds(
    WorkerLoad,
    state=st.sampled_from(WorkerState),
    **{name: COUNTS for name in WorkerLoad.__struct_fields__ if name not in ("state", "load_costs", "ranks")},
)


@settings(max_examples=20)
@given(INFOS, LOADS, st.integers(0, 3))
def test_a_view_says_what_workers_are_and_do(info: WorkerInfo, load: WorkerLoad, ranks: int) -> None:
    parts = [WorkerLoad(state=load.state, requests_running=at, kv_blocks_used=2 * at) for at in range(ranks)]
    load = msgspec.structs.replace(load, ranks=tuple(parts))
    known = worker("d0")
    known.info, known.load = info, load
    (told,) = wire.view([known]).messages
    (entry,) = told.view.workers
    assert wire.worker_info(entry.info) == info
    assert wire.load(entry.load) == load


def test_what_loads_take_is_told_by_medium() -> None:
    told = cluster_pb2.WorkerLoad(load_costs=[cluster_pb2.LoadCost(medium=2, base_s=0.5, token_s=0.001)])
    assert wire.load(told).load_costs == (LoadCost(2, 0.5, 0.001),)


def test_a_worker_without_a_role_is_none_and_an_unknown_state_is_not_ready() -> None:
    assert wire.worker_info(cluster_pb2.WorkerInfo(worker_id="d0")) is None
    assert wire.load(cluster_pb2.WorkerLoad()).state is WorkerState.STARTING


def test_advice_that_no_message_can_say_is_the_longest_that_one_can() -> None:
    failure = Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=1e9)
    told = wire.refusal(ReplyRefusal(session=1, plan_id=1, failure=failure, cause="queue_full"))
    assert told.messages[0].refused.retry_after_ms == 2**32 - 1


@pytest.mark.parametrize(
    ("level", "keys", "match"), [(7, b"", "BlockLevel.level is 0 to 4"), (0, b"123", "BlockLevel.keys has 8 bytes")]
)
def test_a_malformed_delta_is_refused(level: int, keys: bytes, match: str) -> None:
    delta = pb.BlockDelta(seq=1, levels=[pb.BlockLevel(level=level, keys=keys)])
    with pytest.raises(ValueError, match=match):
        wire.block_delta(delta, epoch=1)


def test_keys_of_a_prompt_that_are_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PlanRequest\.block_keys has 8 bytes"):
        wire.plan_requested(1, pb.PlanRequest(plan_id=1, block_keys=b"123"))
