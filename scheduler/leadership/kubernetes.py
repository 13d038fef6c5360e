"""Leadership by a Lease of the Kubernetes cluster that this process runs in. ``rules`` has the rules of time.

Every write names the version that it follows (``resourceVersion`` and ``uid``), so the API server decides between two
candidates, and between a renewal and a takeover. If there is no Lease, at the first start or because it was deleted, a
candidate makes one and waits for a whole term before it claims it: a leader may not know yet that its Lease is gone.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from datetime import UTC, datetime
from http import HTTPStatus

import httpx2
import msgspec
import structlog
from lightkube import ApiError, AsyncClient, KubeConfig
from lightkube.core.exceptions import ConfigError
from lightkube.models.coordination_v1 import LeaseSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.coordination_v1 import Lease

from runtime.timing.clock import Clock
from runtime.user_error import UserError
from scheduler.leadership.rules import LOOKS_PER_TERM, LeaseTerm, next_epoch

log = structlog.get_logger(__name__)

EPOCH = "baton/leader-epoch"
"""Annotation with the last epoch. ``leaseTransitions`` has 32 bits and begins anew with a new Lease."""
# Holder of a Lease that a candidate made because there was none.
NO_LEADER = "none"
AWAY = (httpx2.HTTPError, TimeoutError, OSError, ConfigError, msgspec.MsgspecError)
"""What a call raises where the API server is away, slow, or does not like what it was asked."""


class NoCluster(UserError):
    """No cluster of Kubernetes is known to this process; the message is a sentence."""


class KubernetesLease:
    """The Lease ``name`` in the namespace of ``config``: that of this pod."""

    def __init__(self, config: KubeConfig, *, name: str, lease_s: float, address: str, clock: Clock) -> None:
        self._name = name
        self._lease_s = lease_s
        self._clock = clock
        self._interval_s = lease_s / LOOKS_PER_TERM
        # The environment's proxies are not for the API server.
        self._client = AsyncClient(config, trust_env=False)
        self._term = LeaseTerm(lease_s)
        # The suffix differs at each start, so an earlier process at this address counts as another candidate.
        self._identity = f"{address}_{secrets.token_hex(4)}"
        # As it stands after our last write or look; None: it must be read before the next write.
        self._lease: Lease | None = None
        self._told = ""
        # The largest that this process saw, also in a Lease that was deleted since.
        self._epoch = 0

    @property
    def until_s(self) -> float:
        """When this process must stop deciding unless it renews."""
        return self._term.until_s

    async def acquire(self) -> int:
        """Wait until this process holds the Lease."""
        while True:
            try:
                async with asyncio.timeout(self._interval_s * 2):
                    if await self._try():
                        return self._epoch
                self._told = ""
            except AWAY as error:
                self._warn(error)
            await asyncio.sleep(self._interval_s)

    async def lost(self) -> str:
        """Renew until another process holds the Lease, until it is deleted, or until its time is over."""
        while True:
            await asyncio.sleep(self._interval_s)
            if self._clock.monotonic_s() >= self.until_s:
                return "the Lease was not renewed in time"
            try:
                async with asyncio.timeout(self._interval_s):
                    if not await self._renew():
                        return "another process holds the Lease, or it was deleted"
                self._told = ""
            except AWAY as error:
                # The write may have been done.
                self._lease = None
                self._warn(error)

    async def release(self) -> None:
        """Take our name out of the Lease, if the API server can be reached."""
        leads = self.until_s > float("-inf")
        self._term.end()
        try:
            async with asyncio.timeout(self._interval_s):
                if leads and (lease := await self._ours()) is not None:
                    await self._write(lease, "", self._epoch)
        except AWAY as error:
            self._warn(error)
        await self._client.close()

    async def _try(self) -> bool:
        """Claim the Lease if no process can lead by it any more."""
        lease = await self._read() or await self._create()
        spec, holder = lease.spec or LeaseSpec(), _holder(lease)
        seen_s = self._clock.monotonic_s()
        self._see(lease)
        over = self._term.is_over(_version(lease), seen_s, lease_s=spec.leaseDurationSeconds or 0)
        # If it is in our own name, we wrote an earlier claim whose answer was lost: we never led by it, and may claim.
        if not over and holder not in ("", self._identity):
            return False
        epoch = next_epoch(self._epoch, round(datetime.now(UTC).timestamp() * 1000))
        spec.acquireTime, spec.leaseTransitions = _now(), (spec.leaseTransitions or 0) + 1
        lease.spec = spec
        self._lease = None
        try:
            self._lease = await self._write(lease, self._identity, epoch)
        except ApiError as error:
            if error.status.code in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
                return False
            raise
        self._term.wrote(seen_s)
        self._epoch = epoch
        return True

    async def _renew(self) -> bool:
        """Whether this process still holds the Lease."""
        lease = await self._ours()
        if lease is None:
            return False
        began_s = self._clock.monotonic_s()
        self._lease = None
        try:
            self._lease = await self._write(lease, self._identity, self._epoch)
        except ApiError as error:
            if error.status.code not in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
                raise
            # Not every change is a takeover: read it, and renew at the next look if it is still ours.
            return await self._ours() is not None
        self._term.wrote(began_s)
        return True

    async def _ours(self) -> Lease | None:
        """The Lease where it is in the name of this process."""
        if self._lease is None:
            self._lease = await self._read()
        return self._lease if self._lease is not None and _holder(self._lease) == self._identity else None

    async def _read(self) -> Lease | None:
        try:
            return await self._client.get(Lease, self._name)
        except ApiError as error:
            if error.status.code == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def _create(self) -> Lease:
        spec = LeaseSpec(holderIdentity=NO_LEADER, leaseDurationSeconds=math.ceil(self._lease_s), renewTime=_now())
        annotations = {EPOCH: str(self._epoch)}
        return await self._client.create(
            Lease(metadata=ObjectMeta(name=self._name, annotations=annotations), spec=spec)
        )

    async def _write(self, lease: Lease, holder: str, epoch: int) -> Lease:
        assert lease.metadata is not None and lease.spec is not None
        lease.spec.holderIdentity, lease.spec.renewTime = holder, _now()
        lease.spec.leaseDurationSeconds = math.ceil(self._lease_s)
        lease.metadata.annotations = {**(lease.metadata.annotations or {}), EPOCH: str(epoch)}
        return await self._client.replace(lease)

    def _see(self, lease: Lease) -> None:
        assert lease.metadata is not None
        written = (lease.metadata.annotations or {}).get(EPOCH, "")
        self._epoch = max(self._epoch, int(written) if written.isdecimal() else 0)

    def _warn(self, error: BaseException) -> None:
        """Once, until it works again."""
        why = str(error) or type(error).__name__
        if why != self._told:
            log.warning("the leader's Lease cannot be used", why=why)
        self._told = why


def kube_config() -> KubeConfig:
    """The service account of this pod, or where this is no pod the file that KUBECONFIG names. Raises NoCluster."""
    try:
        return KubeConfig.from_env()
    except (ConfigError, KeyError, OSError) as error:
        raise NoCluster(f"this is no pod and KUBECONFIG names no file: {error}") from error


def _holder(lease: Lease) -> str:
    return (lease.spec.holderIdentity or "") if lease.spec is not None else ""


def _version(lease: Lease) -> str | None:
    return lease.metadata.resourceVersion if lease.metadata is not None else None


def _now() -> datetime:
    """For people. Never a whole second, which would be written without the six digits that MicroTime must have."""
    now = datetime.now(UTC)
    return now.replace(microsecond=max(now.microsecond, 1))
