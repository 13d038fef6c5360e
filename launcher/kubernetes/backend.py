"""A backend whose processes are pods. Kubernetes places, starts and restarts them; this changes how many there are.

It makes no object and changes no template: it reads and writes ``/scale``, marks pods that are to go first, and evicts.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from http import HTTPStatus
from typing import Any, Literal, get_args

import httpx2
import msgspec
import structlog
from lightkube import ApiError, AsyncClient, KubeConfig
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.autoscaling_v1 import ScaleSpec
from lightkube.models.meta_v1 import DeleteOptions, ObjectMeta
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Pod
from lightkube.types import PatchType

from launcher.backend import Member
from launcher.kubernetes.pods import (
    DELETION_COST,
    POOL,
    RELEASE,
    goes_first,
    is_leaving,
    is_replica,
    labels,
    member_of,
    name,
    pod_of,
)
from runtime.timing.backoff import backoff_s
from runtime.user_error import UserError
from scheduler.leadership.kubernetes import AWAY

log = structlog.get_logger(__name__)

Kind = Literal["Deployment", "LeaderWorkerSet"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CALL_TIMEOUT_S = 10.0
WATCH_S = 300
"""The API server is asked to end a watch after so long; one that says nothing for longer is begun again."""
RETRY_MIN_S, RETRY_MAX_S = 0.5, 30.0
CONFLICTS_MAX = 5
"""Others may write the same ``/scale``; so often in a row it is a fight."""
EXIT_S = 30
"""Time that a pod has to end beyond its drain, as in the chart."""

_GROUP = create_namespaced_resource("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets")
_SCALES: Mapping[Kind, Any] = {"Deployment": Deployment.Scale, "LeaderWorkerSet": _GROUP.Scale}
_PLURALS: Mapping[Kind, str] = {"Deployment": "deployments", "LeaderWorkerSet": "leaderworkersets"}


class Refused(UserError):
    """The API server does not let this process do it, or has no such object; the message is a sentence."""


class Missing(Refused):
    """The API server has no such object."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The object whose ``/scale`` says how many replicas a pool has."""

    kind: Kind
    name: str


class KubernetesBackend:
    """The pods of one release of the chart. A ProcessBackend; ``targets`` are the pools that it may scale, by name."""

    def __init__(self, config: KubeConfig, release: str, targets: Mapping[str, Target]) -> None:
        # The environment's proxies are not for the API server.
        self._client = AsyncClient(config, timeout=httpx2.Timeout(CALL_TIMEOUT_S), trust_env=False)
        self._labels: dict[str, Any] = {RELEASE: release}
        self._targets = targets
        self._closed = False
        self._steps: set[asyncio.Future[Member]] = set()

    async def set_replicas(self, pool: str, replicas: int, *, go_first: Sequence[str] = ()) -> None:
        """Grow or shrink a pool; idempotent. A group of pods that is to go first cannot be chosen: the last one goes.

        Raises ValueError for a pool that is not one of the targets, Refused, and what is in ``AWAY``.
        """
        await self._scale(pool, lambda _: replicas, go_first)

    async def stop(self, id: str, *, drain_s: float, replace: bool) -> None:  # noqa: A002 - the interface's name
        """Evict one pod, or shrink its pool by it; then its own grace period counts, and not ``drain_s``.

        A disruption budget may refuse an eviction: Refused. Its successor starts while it still drains.
        """
        if not replace:
            with self._refusals("get", f"pods/{id}"):
                pod = await self._client.get(Pod, id)
            if is_leaving(pod):
                # Its pool is one smaller already, or has its successor.
                return
            await self._scale(labels(pod).get(POOL, ""), lambda present: max(0, present - 1), [id])
            return
        options = DeleteOptions(gracePeriodSeconds=math.ceil(drain_s) + EXIT_S)
        eviction = Pod.Eviction(metadata=ObjectMeta(name=id), deleteOptions=options)
        try:
            with self._refusals("create", f"pods/eviction of {id}"):
                await self._client.create(eviction, id)
        except ApiError as error:
            if _code(error) == HTTPStatus.TOO_MANY_REQUESTS:
                raise Refused(f"{id} cannot go now: {error}") from error
            raise

    async def list(self) -> Sequence[Member]:
        """Every pod of the release that is a replica."""
        _, pods = await self._pods({})
        return [member_of(pod) for pod in pods.values()]

    async def watch(self) -> AsyncGenerator[Member]:
        """Every replica as it is, then every change, until the backend closes. After any error it lists again.

        Raises Refused.
        """
        async with contextlib.aclosing(self._changes()) as changes:
            while not self._closed:
                step: asyncio.Future[Member] = asyncio.ensure_future(anext(changes))
                self._steps.add(step)
                try:
                    await asyncio.wait({step})
                finally:
                    self._steps.discard(step)
                    await _end({step})
                if step.cancelled():
                    return
                yield step.result()

    async def logs(self, id: str, *, lines: int) -> Sequence[str]:  # noqa: A002 - the interface's name
        """The last lines of a pod's log."""
        if lines <= 0:
            return []
        with self._refusals("get", f"pods/log of {id}"):
            return [line async for line in self._client.log(id, tail_lines=lines, newlines=False)]

    async def close(self) -> None:
        """End every watch. The pods stay: they are Kubernetes' to end."""
        self._closed = True
        await _end(self._steps)
        await self._client.close()

    # Scaling

    async def _scale(self, pool: str, wanted: Callable[[int], int], go_first: Sequence[str]) -> None:
        """``wanted``: how many there are to be, of how many there are."""
        target = self._targets.get(pool)
        if target is None:
            raise ValueError(f"the pool {pool} is not scaled here; these are: {', '.join(sorted(self._targets))}")
        scales, what = _SCALES[target.kind], f"{_PLURALS[target.kind]}/scale of {target.name}"
        for _ in range(CONFLICTS_MAX):
            with self._refusals("get", what):
                scale = await self._client.get(scales, target.name)
            present = (scale.spec and scale.spec.replicas) or 0
            replicas = wanted(present)
            if replicas == present:
                return
            if replicas < present and target.kind == "Deployment":
                await self._mark(pool, go_first, present - replicas)
            scale.spec = ScaleSpec(replicas=replicas)
            try:
                # It names the version that it follows.
                with self._refusals("update", what):
                    await self._client.replace(scale)
            except ApiError as error:
                if _code(error) != HTTPStatus.CONFLICT:
                    raise
            else:
                return
        raise Refused(f"{what} was changed by another client {CONFLICTS_MAX} times in a row: two scale the pool {pool}")

    async def _mark(self, pool: str, go_first: Sequence[str], count: int) -> None:
        """Have these pods go before all others of the pool, which are not marked. Not ready ones go before any."""
        _, pods = await self._pods({POOL: pool})
        present = {each: pod for each, pod in pods.items() if not is_leaving(pod)}
        named = (pod_of(each, present) for each in go_first)
        going = [each for each in dict.fromkeys(named) if each in present][:count]
        for each, pod in present.items():
            if goes_first(pod) is not (each in going):
                # None takes the annotation away.
                annotations = {DELETION_COST: "-1" if each in going else None}
                # A pod that went meanwhile needs no mark.
                with contextlib.suppress(Missing), self._refusals("patch", f"pods/{each}"):
                    body = {"metadata": {"annotations": annotations}}
                    await self._client.patch(Pod, each, body, patch_type=PatchType.MERGE)

    # Watching

    async def _pods(self, more: Mapping[str, str]) -> tuple[str, Mapping[str, Pod]]:
        """The version of the list, and the replicas by name."""
        listed = self._client.list(Pod, labels={**self._labels, **more})
        with self._refusals("list", "pods"):
            pods = {name(pod): pod async for pod in listed if is_replica(pod)}
        return listed.resourceVersion, pods

    async def _changes(self) -> AsyncGenerator[Member]:
        known: dict[str, Member] = {}
        failures = 0
        while True:
            try:
                version, pods = await self._pods({})
                for gone in [each for each in known if each not in pods]:
                    yield _ended(known.pop(gone))
                for pod in pods.values():
                    if (member := member_of(pod)) != known.get(member.id):
                        known[member.id] = member
                        yield member
                async with contextlib.aclosing(self._events(version)) as events:
                    async for kind, pod in events:
                        failures, member = 0, member_of(pod)
                        if kind == "DELETED":
                            known.pop(member.id, None)
                            yield _ended(member)
                        elif member != known.get(member.id):
                            known[member.id] = member
                            yield member
            except AWAY as error:
                failures += 1
                if failures == 1:
                    log.info("the watch of pods ended, and begins again", why=str(error) or type(error).__name__)
                await asyncio.sleep(backoff_s(failures, min_s=RETRY_MIN_S, max_s=RETRY_MAX_S))

    async def _events(self, version: str) -> AsyncGenerator[tuple[str, Pod]]:
        """What happens to replicas after this version. Ends when nothing was heard for longer than a watch lasts."""
        watched: Any = self._client.watch(Pod, labels=self._labels, resource_version=version, server_timeout=WATCH_S)
        async with contextlib.aclosing(watched):
            while True:
                try:
                    async with asyncio.timeout(WATCH_S + CALL_TIMEOUT_S):
                        with self._refusals("watch", "pods"):
                            kind, pod = await anext(watched)
                except TimeoutError:
                    return
                if is_replica(pod):
                    yield kind, pod

    @contextlib.contextmanager
    def _refusals(self, verb: str, what: str) -> Iterator[None]:
        """Say in a sentence what this process may not do."""
        try:
            yield
        except httpx2.HTTPStatusError as error:
            where = f"in the namespace {self._client.namespace}"
            if _code(error) == HTTPStatus.FORBIDDEN:
                raise Refused(f"this service account has no right to {verb} {what} {where}") from error
            if _code(error) == HTTPStatus.NOT_FOUND:
                raise Missing(f"there is nothing to {verb} {where}: {what}") from error
            raise


async def _end(steps: AbstractSet[asyncio.Future[Member]]) -> None:
    """Cancel those that are not done, and wait for them."""
    running = [step for step in steps if not step.done()]
    for step in running:
        step.cancel()
    if running:
        await asyncio.wait(running)


def _ended(member: Member) -> Member:
    return msgspec.structs.replace(member, state="ended", incarnation="")


def _code(error: httpx2.HTTPStatusError) -> int:
    """An event of a watch has no answer of its own."""
    return (error.status.code or 0) if isinstance(error, ApiError) else error.response.status_code
