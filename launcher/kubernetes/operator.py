"""Gives pools of Kubernetes the size that the scheduler wants (`scheduler.scaling.actuator=operator`). Decides none.

The scheduler tells again every few seconds what it wants, so a size that another client changed, or that could not be
written, is put right at the next word. While no scheduler leads, every pool stays as it is.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

import grpc
import msgspec
import structlog

from launcher.backend import ProcessBackend
from launcher.kubernetes.backend import KINDS, Kind, Refused
from protos.cluster.v1.cluster_pb2 import PoolReplicas
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.roles import WORKER_ROLES, WorkerRole
from runtime.user_error import UserError
from scheduler.leadership.kubernetes import AWAY
from scheduler.operator_client import watch_replicas

log = structlog.get_logger(__name__)

NAME = "operator"
"""As `scheduler.scaling.actuator` says it."""
SILENCE_S = 10.0
"""The leading scheduler says something every 5 s."""
RETRY_S = 1.0
WRITE_TIMEOUT_S = 60.0
"""For one pool, with every pod that is to be marked."""
Watch = Callable[[], AsyncGenerator[pb.DesiredReplicas]]

_POOL = re.compile(r"(?P<name>[a-z0-9]([-a-z0-9]*[a-z0-9])?)=(?P<role>\w+):(?P<kind>\w+):(?P<replicas_max>\d{1,4})")


class BadPool(UserError):
    """A pool that is not written as it must be; the message is a sentence."""

    exit_code = 2


class ScaledPool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of the chart whose size follows the scheduler: of one role all workers are in one pool."""

    name: str
    role: WorkerRole
    kind: Kind
    replicas_max: int


def parse(words: Sequence[str]) -> Mapping[WorkerRole, ScaledPool]:
    """Pools as `--pool NAME=ROLE:KIND:MAX` names them, by role. Raises BadPool."""
    found: dict[WorkerRole, ScaledPool] = {}
    for word in words:
        match = _POOL.fullmatch(word)
        if match is None:
            raise BadPool(f"--pool {word}: write NAME=ROLE:KIND:MAX, as in decode=decode:Deployment:8")
        role = next((role for role in WORKER_ROLES if role == match["role"]), None)
        kind = next((kind for kind in KINDS if kind == match["kind"]), None)
        if role is None:
            raise BadPool(f"--pool {word}: the role is {' or '.join(WORKER_ROLES)}, not {match['role']}")
        if kind is None:
            raise BadPool(f"--pool {word}: the kind is {' or '.join(KINDS)}, not {match['kind']}")
        if role in found:
            raise BadPool(f"--pool {word}: {found[role].name} has that role already, and one pool of a role is scaled")
        found[role] = ScaledPool(name=match["name"], role=role, kind=kind, replicas_max=int(match["replicas_max"]))
    if not found:
        raise BadPool("--pool names no pool: there is nothing to scale")
    return found


def from_scheduler(scheduler_address: str) -> Watch:
    """What the leading scheduler wants."""
    return lambda: watch_replicas(scheduler_address, NAME, timeout_s=SILENCE_S)


class Operator:
    """Of one release. ``trouble`` says why it cannot do its work now; empty: it can."""

    def __init__(self, backend: ProcessBackend, pools: Mapping[WorkerRole, ScaledPool], watch: Watch) -> None:
        self.trouble = ""
        self._backend = backend
        self._pools = pools
        self._watch = watch
        # As last written, by pool.
        self._replicas: dict[str, int] = {}

    async def run(self) -> None:
        """Do what is wanted, until cancelled."""
        while True:
            try:
                async with aclosing(self._watch()) as watched:
                    async for desired in watched:
                        await self.act(desired)
            except grpc.aio.AioRpcError as error:
                # Of FAILED_PRECONDITION: another actuator is to act.
                self._note(f"the scheduler does not say what it wants: {error.details() or error.code().name}")
            except TimeoutError:
                self._note(f"the scheduler has not said for {SILENCE_S:g} s what it wants")
            # A pause between two attempts: nothing tells when the next scheduler leads.
            await asyncio.sleep(RETRY_S)

    async def act(self, desired: pb.DesiredReplicas) -> None:
        """Write the sizes that are wanted. Where one cannot be written now, the next word tries again."""
        trouble = ""
        for wanted in desired.pools:
            pool = next((each for role, each in self._pools.items() if role == wanted.pool), None)
            if pool is not None:
                trouble = await self._resize(pool, wanted) or trouble
        self._note(trouble)

    async def _resize(self, pool: ScaledPool, wanted: PoolReplicas) -> str:
        """Why the pool has another size than is wanted; empty: it has this size."""
        replicas = min(wanted.replicas, pool.replicas_max)
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._backend.set_replicas(pool.name, replicas, go_first=wanted.worker_ids)
        except Refused as error:
            return str(error)
        except AWAY as error:
            return (
                f"the API server does not take the size of the pool {pool.name}: {str(error) or type(error).__name__}"
            )
        if self._replicas.get(pool.name) != replicas:
            self._replicas[pool.name] = replicas
            log.info("pool follows", pool=pool.name, replicas=replicas, wanted=wanted.replicas, why=wanted.reason)
        return ""

    def _note(self, trouble: str) -> None:
        """Log it once, until it changes."""
        if trouble and trouble != self.trouble:
            log.error("pools do not follow the scheduler", why=trouble)
        elif self.trouble and not trouble:
            log.info("pools follow the scheduler again")
        self.trouble = trouble
