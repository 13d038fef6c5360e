"""Pools follow what the scheduler wants: which change, which workers end, and what is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest

from launcher.backend import Member, MemberState
from launcher.hosted import actuator as module
from launcher.hosted.actuator import Actuator, Change, changes
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.roles import WorkerRole
from tests.launcher.backend_contract import Rig, seen
from tests.launcher.hosted.test_backend_contract import FakeRig


def member(name: str, state: MemberState = "ready", why: str = "") -> Member:
    return Member(id=name, pool=name.rpartition("-")[0], state=state, why=why)


CLUSTER = [member(name) for name in ("scheduler-0", "prefill-0", "decode-0", "decode-1", "decode-2", "front-proxy-0")]
ORDER = ("prefill-0", "decode-1", "decode-2", "decode-0")


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        (1, 3, []),
        (1, 1, [Change("decode", 1, ("decode-1", "decode-2"))]),
        (0, 0, [Change("prefill", 0, ("prefill-0",)), Change("decode", 0, ("decode-1", "decode-2", "decode-0"))]),
        # There is room for one more.
        (2, 3, [Change("prefill", 2, ())]),
        (3, 4, [Change("prefill", 2, ())]),
        (2, 2, [Change("prefill", 2, ()), Change("decode", 2, ("decode-1",))]),
    ],
)
def test_pools_grow_as_far_as_there_is_room_and_shrink_by_those_that_end_first(
    prefill: int, decode: int, expected: list[Change]
) -> None:
    assert changes({"prefill": prefill, "decode": decode}, CLUSTER, {}, ORDER, workers_max=5) == expected


def test_a_worker_counts_for_the_role_that_it_has_now() -> None:
    roles: dict[str, WorkerRole] = {"decode-1": "prefill"}
    assert changes({"prefill": 2, "decode": 2}, CLUSTER, roles, ORDER, workers_max=4) == []
    found = changes({"prefill": 1, "decode": 2}, CLUSTER, roles, ("decode-1", "prefill-0", "decode-0"), workers_max=4)
    assert found == [Change("decode", 2, ("decode-1",))]


def test_a_worker_that_has_not_registered_ends_first() -> None:
    starts = [*CLUSTER, member("decode-3", "starting")]
    assert changes({"prefill": 1, "decode": 3}, starts, {}, ORDER, workers_max=5) == [
        Change("decode", 3, ("decode-3",))
    ]


def test_one_that_ends_starts_again_in_its_own_place_and_no_other_takes_it() -> None:
    ends = [member("prefill-0"), member("decode-0", "draining"), member("decode-1", "ended")]
    assert changes({"prefill": 1, "decode": 1}, ends, {}, (), workers_max=2) == [Change("decode", 1, ())]
    assert changes({"prefill": 2, "decode": 0}, ends, {}, (), workers_max=2) == []


def test_one_that_failed_for_good_is_not_replaced_without_room() -> None:
    failed = [
        member("prefill-0"),
        member("decode-0", "ended", why="ended with exit code 3"),
        member("decode-1", "ended"),
    ]
    assert changes({"prefill": 1, "decode": 1}, failed, {}, (), workers_max=2) == []
    assert changes({"prefill": 1, "decode": 1}, failed, {}, (), workers_max=3) == [Change("decode", 1, ())]


def wanted(prefill: int, decode: int, *worker_ids: str) -> pb.DesiredReplicas:
    pools = [
        cluster_pb2.PoolReplicas(
            pool=role, replicas=count, reason=f"{role} why", worker_ids=[name for name in worker_ids if role in name]
        )
        for role, count in (("prefill", prefill), ("decode", decode))
    ]
    return pb.DesiredReplicas(pools=pools)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return FakeRig(tmp_path / "cluster")


async def test_a_cluster_goes_to_sleep_wakes_and_shrinks_by_the_idle_one(rig: Rig) -> None:
    said: list[str] = []
    async with rig.up() as backend:
        actuator = Actuator(backend, lambda: "", workers_max=3, say=said.append)
        await actuator.act(pb.DesiredReplicas())
        await actuator.act(wanted(1, 2))
        assert said == []
        await actuator.act(wanted(0, 0, "prefill-0", "decode-1", "decode-0"))
        for name in ("prefill-0", "decode-0", "decode-1"):
            await seen(backend, name, "ended")
        assert said[0] == "pool prefill: 0 workers from now on (prefill: prefill why; decode: decode why)"
        assert set(rig.told_to_stop()) == {"prefill-0", "decode-0", "decode-1"}
        await actuator.act(wanted(1, 2))
        for name in ("prefill-0", "decode-0", "decode-1"):
            await seen(backend, name, "ready")
        await actuator.act(wanted(1, 1, "prefill-0", "decode-1", "decode-0"))
        await seen(backend, "decode-1", "ended")
        assert [one.id for one in await backend.list() if one.state == "ready"] == [
            "scheduler", "prefill-0", "decode-0", "front-proxy-0",
        ]  # fmt: skip


async def test_that_another_actuator_is_to_act_is_said_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Semaphore(0)
    said: list[str] = []

    async def watch(*_: object, **__: object) -> AsyncGenerator[pb.DesiredReplicas]:
        asked.release()
        nothing = grpc.aio.Metadata()
        why = "scheduler.scaling.actuator is keda, so 'launcher' must not act."
        for desired in list[pb.DesiredReplicas]():
            yield desired
        raise grpc.aio.AioRpcError(grpc.StatusCode.FAILED_PRECONDITION, nothing, nothing, why, "")

    monkeypatch.setattr(module, "watch_replicas", watch)
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    async with rig.up() as backend, module.running(Actuator(backend, lambda: "", workers_max=3, say=said.append)):
        for _ in range(3):
            await asked.acquire()
    assert said == ["error: pools keep their sizes: scheduler.scaling.actuator is keda, so 'launcher' must not act."]
