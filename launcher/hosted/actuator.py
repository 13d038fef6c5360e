"""Gives pools of workers the sizes that the scheduler wants (`scheduler.scaling.actuator=launcher`). Decides none.

Over any backend. `baton up` runs as many workers as it was told to start at most, of both roles together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing

import grpc
import msgspec

from launcher.backend import Member, ProcessBackend
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.roles import WORKER_ROLES, WorkerRole
from scheduler.operator_client import watch_replicas

NAME = "launcher"
SILENCE_S = 10.0
"""The leading scheduler says something every 5 s."""
RETRY_S = 1.0

Say = Callable[[str], None]


class Change(msgspec.Struct, frozen=True):
    """A pool is to have so many replicas, and of those that are too many these are to end first."""

    pool: str
    replicas: int
    go_first: tuple[str, ...]


def changes(
    wanted: Mapping[WorkerRole, int],
    members: Sequence[Member],
    role_of: Mapping[str, WorkerRole],
    end_order: Sequence[str],
    *,
    workers_max: int,
) -> list[Change]:
    """What is to change in the pools, of which each is named after the role that its workers start in.

    ``role_of``: by id, where it may have changed since. ``end_order``: ids, the first to end first. A worker that is in
    neither is not registered, runs nothing, and ends before all others. One that failed for good takes up room.
    """
    workers = [each for each in members if each.pool in WORKER_ROLES]
    live = [each for each in workers if each.state not in ("draining", "ended")]
    before = Counter(each.pool for each in live)
    sizes, ending = before.copy(), Counter(each.pool for each in workers if each.state == "draining")
    room = workers_max - len(live) - ending.total() - sum(each.state == "ended" and each.why != "" for each in workers)
    order = {worker_id: place for place, worker_id in enumerate(end_order)}
    go_first: list[Member] = []
    for role in WORKER_ROLES:
        having = [each for each in live if role_of.get(each.id, each.pool) == role]
        missing = wanted[role] - len(having)
        if missing < 0:
            having.sort(key=lambda each: order.get(each.id, -1))
            go_first += having[:-missing]
        else:
            # One that ends anyway starts again in its own place.
            grown = min(missing, ending[role] + max(0, room))
            room -= max(0, grown - ending[role])
            sizes[role] += grown
    sizes.subtract(each.pool for each in go_first)
    return [
        Change(pool, sizes[pool], tuple(each.id for each in go_first if each.pool == pool))
        for pool in WORKER_ROLES
        if sizes[pool] != before[pool]
    ]


class Actuator:
    """Of one cluster that is up."""

    def __init__(self, backend: ProcessBackend, schedulers: Callable[[], str], *, workers_max: int, say: Say) -> None:
        """``schedulers``: their addresses now, with commas between them."""
        self._backend = backend
        self._schedulers = schedulers
        self._workers_max = workers_max
        self._say = say
        # As last heard: a worker that is just started again will take its role anew.
        self._role_of: dict[str, WorkerRole] = {}

    async def run(self) -> None:
        """Do what the leading scheduler wants, until cancelled. While none leads all stays as it is."""
        refused = ""
        while True:
            try:
                async with aclosing(watch_replicas(self._schedulers(), NAME, timeout_s=SILENCE_S)) as watched:
                    async for desired in watched:
                        refused = ""
                        await self.act(desired)
            except TimeoutError:
                pass
            except grpc.aio.AioRpcError as error:
                # It would stay so: another actuator is to act, or too many listen.
                if error.code() is not grpc.StatusCode.UNAVAILABLE and (why := error.details() or "") != refused:
                    refused = why
                    self._say(f"error: pools keep their sizes: {why}")
            # A pause between two attempts: nothing tells when the next scheduler leads.
            await asyncio.sleep(RETRY_S)

    async def act(self, desired: pb.DesiredReplicas) -> None:
        """Begin what is to change; returns before it is done. Idempotent."""
        told = {role: pool for pool in desired.pools for role in WORKER_ROLES if pool.pool == role}
        if len(told) < len(WORKER_ROLES):
            return
        self._role_of |= {worker_id: role for role, pool in told.items() for worker_id in pool.worker_ids}
        found = changes(
            {role: pool.replicas for role, pool in told.items()},
            await self._backend.list(),
            self._role_of,
            [worker_id for pool in told.values() for worker_id in pool.worker_ids],
            workers_max=self._workers_max,
        )
        for change in found:
            why = "; ".join(dict.fromkeys(f"{role}: {pool.reason}" for role, pool in told.items()))
            self._say(f"pool {change.pool}: {change.replicas} workers from now on ({why})")
            await self._backend.set_replicas(change.pool, change.replicas, go_first=change.go_first)


@contextlib.asynccontextmanager
async def running(actuator: Actuator) -> AsyncIterator[None]:
    """Let it act meanwhile."""
    acting = asyncio.create_task(actuator.run(), name="actuator")
    try:
        yield
    finally:
        acting.cancel()
        await asyncio.gather(acting, return_exceptions=True)
