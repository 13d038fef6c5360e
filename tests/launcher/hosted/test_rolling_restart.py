"""A rolling restart goes on only when every worker has found the scheduler that leads."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence

import msgspec
import pytest

from launcher.backend import Member
from launcher.hosted.rolling_restart import Refusal, RollingRestart
from protos.cluster.v1 import cluster_pb2
from runtime.roles import Role

ROLES: dict[str, Role] = {"scheduler": "scheduler", "prefill": "prefill", "decode": "decode", "front": "front_proxy"}
MEMBERS = tuple(
    Member(id=f"{pool}-{index}", pool=pool, state="ready", incarnation="1.1", address=f"{pool}-{index}")
    for pool in ("decode", "front", "prefill", "scheduler")
    for index in range(2)
)
WORKERS = 4
BACK = tuple(msgspec.structs.replace(member, incarnation="2.1") for member in MEMBERS)


class Backend:
    """Replaces at once; its watchers are told of ``after``."""

    def __init__(self, after: Sequence[Member] = BACK) -> None:
        self.after = after
        self.stopped: list[tuple[str, float]] = []

    async def set_replicas(self, pool: str, replicas: int, *, go_first: Sequence[str] = ()) -> None:
        raise NotImplementedError

    async def stop(self, id: str, *, drain_s: float, replace: bool) -> None:  # noqa: A002 - the interface's name
        assert replace
        self.stopped.append((id, drain_s))

    async def list(self) -> Sequence[Member]:
        return MEMBERS

    async def watch(self) -> AsyncGenerator[Member]:
        for member in (*MEMBERS, *self.after):
            yield member

    async def logs(self, id: str, *, lines: int) -> Sequence[str]:  # noqa: A002 - the interface's name
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def says(state: str, workers: int) -> cluster_pb2.ProcessStatus:
    return cluster_pb2.ProcessStatus(state=state, workers_registered=workers)


def restarts(backend: Backend, said: Mapping[str, cluster_pb2.ProcessStatus | None] | None = None) -> RollingRestart:
    async def status(address: str) -> cluster_pb2.ProcessStatus | None:
        return (said or {})[address]

    return RollingRestart(backend, roles=ROLES, drain_s=len, status=status, within_s=0.05, poll_interval_s=0.01)


async def steps(restarting: RollingRestart, process_id: str) -> list[tuple[str, str, str]]:
    return [(step.id, step.what, step.incarnation) async for step in restarting.restart(process_id)]


async def test_schedulers_go_first_and_one_process_after_the_other() -> None:
    said = dict.fromkeys(("scheduler-0", "scheduler-1"), says("ready", WORKERS))
    found = await steps(restarts(Backend(), said), "all")
    order = [f"{pool}-{index}" for pool in ROLES for index in range(2)]
    assert found == [step for name in order for step in ((name, "stopping", "1.1"), (name, "ready", "2.1"))]


@pytest.mark.parametrize(
    ("restarted", "other", "whole"),
    [
        (says("standby", 0), says("ready", WORKERS), True),
        (says("ready", WORKERS), says("standby", 0), True),
        (says("ready", WORKERS), None, True),
        (says("standby", 0), says("ready", WORKERS - 1), False),
        (says("standby", WORKERS), says("standby", WORKERS), False),
        (None, says("ready", WORKERS), False),
    ],
)
async def test_a_scheduler_is_back_when_every_worker_has_found_the_one_that_leads(
    restarted: cluster_pb2.ProcessStatus | None, other: cluster_pb2.ProcessStatus | None, whole: bool
) -> None:
    restarting = restarts(Backend(), {"scheduler-0": restarted, "scheduler-1": other})
    refused = pytest.raises(Refusal, match=r"scheduler-0 came back, but within 0\.05 s not every worker")
    with contextlib.nullcontext() if whole else refused:
        await steps(restarting, "scheduler-0")


async def test_each_process_has_the_time_of_its_role_and_one_without_a_successor_is_told() -> None:
    backend = Backend()
    await steps(restarts(backend), "decode-1")
    assert backend.stopped == [("decode-1", len("decode"))]
    lost = Member(id="decode-1", pool="decode", state="ended", why="ended with exit code 3")
    for after, why in (([lost], "ended with exit code 3"), ([], "was not waited for: the cluster stops")):
        with pytest.raises(Refusal, match=f"decode-1 {why}"):
            await steps(restarts(Backend(after)), "decode-1")
