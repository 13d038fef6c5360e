"""Replaces processes one after the other, over any backend. Starts and stops nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Literal

import msgspec

from launcher.backend import Member, ProcessBackend
from protos.cluster.v1 import cluster_pb2
from runtime.roles import WORKER_ROLES, Role

# Schedulers first: they run no request, and a worker that comes back later registers with the new one.
_ORDER: tuple[Role, ...] = ("scheduler", "prefill", "decode", "front_proxy")

Status = Callable[[str], Awaitable[cluster_pb2.ProcessStatus | None]]
"""What the process at an address says of itself; None when it does not answer in time."""


class Step(msgspec.Struct, frozen=True):
    """One step of a restart. ``incarnation`` is of the process that ends, or of its successor; empty: none runs."""

    id: str
    what: Literal["stopping", "ready"]
    incarnation: str


class Refusal(Exception):
    """A command that is not carried out, or not to its end; the message says why, in a sentence."""

    def __init__(self, kind: Literal["unknown", "busy", "aborted"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RollingRestart:
    """Restarts of one cluster, one at a time. ``roles``: by pool; ``drain_s``: by role, the time to finish requests."""

    def __init__(
        self,
        backend: ProcessBackend,
        *,
        roles: Mapping[str, Role],
        drain_s: Callable[[Role], float],
        status: Status,
        within_s: float,
        poll_interval_s: float,
    ) -> None:
        self._backend = backend
        self._roles = roles
        self._drain_s = drain_s
        self._status = status
        self._within_s = within_s
        self._poll_interval_s = poll_interval_s
        self._running = False

    async def restart(self, process_id: str) -> AsyncIterator[Step]:
        """Replace one process, or "all", one after the other; yields what happens. Raises Refusal."""
        members = {member.id: member for member in await self._backend.list()}
        if process_id != "all" and process_id not in members:
            raise Refusal("unknown", f"there is no process {process_id}; there are {', '.join(members)}")
        if self._running:
            raise Refusal("busy", "another restart runs already")
        self._running = True
        try:
            in_order = sorted(members.values(), key=lambda member: _ORDER.index(self._roles[member.pool]))
            # Those that were ended on purpose stay so.
            all_of_them = [member for member in in_order if member.state != "ended" or member.why]
            chosen = all_of_them if process_id == "all" else [members[process_id]]
            for one in chosen:
                [before] = [member for member in await self._backend.list() if member.id == one.id]
                yield Step(one.id, "stopping", before.incarnation)
                after = await self._replaced(before)
                if self._roles[one.pool] == "scheduler":
                    await self._settled(one)
                yield Step(one.id, "ready", after.incarnation)
        finally:
            self._running = False

    async def _replaced(self, before: Member) -> Member:
        """Wait until the process has a successor that serves. Raises Refusal."""
        async with contextlib.aclosing(self._backend.watch()) as changes:
            await self._backend.stop(before.id, drain_s=self._drain_s(self._roles[before.pool]), replace=True)
            async for now in changes:
                if now.id != before.id:
                    continue
                if now.state == "ready" and now.incarnation != before.incarnation:
                    return now
                if now.state == "ended":
                    raise Refusal("aborted", f"{now.id} {now.why or 'was stopped meanwhile'}")
        raise Refusal("aborted", f"{before.id} was not waited for: the cluster stops")

    async def _settled(self, restarted: Member) -> None:
        """Wait until the other processes have found a scheduler that came back. Raises Refusal.

        A worker reports ready when it is registered, and a front proxy when it can serve. A scheduler reports ready
        when it listens. Every ready worker must register with the scheduler that leads before the next process stops.
        The restarted scheduler may be a standby now.
        """
        try:
            async with asyncio.timeout(self._within_s):
                while not await self._has_settled(restarted):  # noqa: ASYNC110 - the scheduler is another process
                    # Only the scheduler knows which workers have registered, and it answers only when asked.
                    await asyncio.sleep(self._poll_interval_s)
        except TimeoutError:
            missing = f"within {self._within_s:g} s not every worker has registered with a scheduler that leads"
            raise Refusal("aborted", f"{restarted.id} came back, but {missing}") from None

    async def _has_settled(self, restarted: Member) -> bool:
        members = await self._backend.list()
        schedulers = [member for member in members if self._roles[member.pool] == "scheduler"]
        answers = await asyncio.gather(*(self._status(member.address) for member in schedulers))
        said = dict(zip((member.id for member in schedulers), answers, strict=True))
        registered = [each.workers_registered for each in said.values() if each and each.state == "ready"]
        workers = sum(self._roles[member.pool] in WORKER_ROLES and member.state == "ready" for member in members)
        return said[restarted.id] is not None and max(registered, default=-1) >= workers
