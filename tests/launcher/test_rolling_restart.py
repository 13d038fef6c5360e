"""A rolling restart goes on only when every worker has found the scheduler that leads."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import pytest

from launcher.backend import Member
from launcher.rolling_restart import Refusal, RollingRestart
from protos.cluster.v1 import cluster_pb2
from runtime.roles import Role

ROLES: dict[str, Role] = {"scheduler": "scheduler", "prefill": "prefill", "decode": "decode", "front": "front_proxy"}
MEMBERS = tuple(
    Member(id=f"{pool}-{index}", pool=pool, state="ready", incarnation="1.1", address=f"{pool}-{index}")
    for pool in ("decode", "front", "prefill", "scheduler")
    for index in range(2)
)
WORKERS = 4


class Backend:
    """Replaces at once; what comes back is as ``after`` says."""

    def __init__(self, after: Member | None = None) -> None:
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
        for member in (*MEMBERS, self.after) if self.after else MEMBERS:
            yield member

    async def logs(self, id: str, *, lines: int) -> Sequence[str]:  # noqa: A002 - the interface's name
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def says(state: str, workers: int) -> cluster_pb2.ProcessStatus:
    return cluster_pb2.ProcessStatus(state=state, workers_registered=workers)


def restarts(backend: Backend, said: dict[str, cluster_pb2.ProcessStatus | None] | None = None) -> RollingRestart:
    async def status(address: str) -> cluster_pb2.ProcessStatus | None:
        return (said or {})[address]

    return RollingRestart(backend, roles=ROLES, drain_s=len, status=status, within_s=0.05, poll_interval_s=0.01)


def test_schedulers_go_first_one_after_the_other() -> None:
    order = [member.id for member in restarts(Backend()).in_order(MEMBERS)]
    assert order[:3] == ["scheduler-0", "scheduler-1", "prefill-0"]


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
    said = {"scheduler-0": restarted, "scheduler-1": other}
    problem = await restarts(Backend(), said).settled(MEMBERS[-2])
    assert (problem == "") is whole


async def test_a_restart_ends_with_the_successor_or_says_why_there_is_none() -> None:
    ready = Member(id="decode-1", pool="decode", state="ready", incarnation="2.1")
    backend = Backend(ready)
    steps = [(step.what, step.incarnation) async for step in restarts(backend).restart("decode-1")]
    assert steps == [("stopping", "1.1"), ("ready", "2.1")]
    assert backend.stopped == [("decode-1", len("decode"))]
    for after, why in (
        (Member(id="decode-1", pool="decode", state="ended", why="ended with exit code 3"), "ended with exit code 3"),
        (None, "was not waited for: the cluster stops"),
    ):
        with pytest.raises(Refusal, match=f"decode-1 {why}"):
            [step async for step in restarts(Backend(after)).restart("decode-1")]
