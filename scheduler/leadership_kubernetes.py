"""The leader's lease in a Lease of Kubernetes. Reads and writes; ``scheduler.leadership`` has the rules of time.

Every write names the version that it follows (``resourceVersion``), and the API server refuses it (409) where somebody
else wrote meanwhile: that decides between contenders, and between a renewal and a takeover. A write whose answer got
lost may have been done, so what is there is read before the next.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from runtime.clock import Clock
from scheduler.kubernetes_api import Answer, KubernetesApi, reason_of
from scheduler.leadership import Holder, Tenure, Watch, next_epoch

EPOCH = "baton/leader-epoch"
"""Annotation with the epoch of the leadership: ``leaseTransitions`` begins anew where the Lease was deleted."""
_ASKED = "-asked"
_GROUP = "coordination.k8s.io/v1"


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str
    uid: str
    annotations: dict[str, str] | None = None


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    lease_transitions: int | None = None
    acquire_time: str | None = None


class _Lease(msgspec.Struct, frozen=True):
    metadata: _Meta
    spec: _Spec = _Spec()


class _Read:
    """A Lease as it was at one version. ``whole`` keeps what we do not know, for the next write."""

    def __init__(self, body: bytes) -> None:
        try:
            lease = msgspec.json.decode(body, type=_Lease)
            self.whole: dict[str, Any] = msgspec.json.decode(body)
            epoch = int((lease.metadata.annotations or {}).get(EPOCH, "0"))
        except ValueError as error:
            raise ConnectionError(f"the API server's answer is no Lease: {error}") from error
        self.version = (lease.metadata.uid, lease.metadata.resource_version)
        self.identity = lease.spec.holder_identity or ""
        self.lease_s = float(lease.spec.lease_duration_seconds or 0)
        # One more than this with the next leader. One that nobody ever held tells of no leadership, so begins with 0.
        self.ever_held = lease.spec.acquire_time is not None
        self.transitions = (lease.spec.lease_transitions or 0) if self.ever_held else -1
        # The address, and behind it what makes the identity one of a kind.
        self.holder = Holder(epoch, self.identity.rpartition("_")[0])


class KubernetesLease:
    """The Lease ``name``; ``holderIdentity`` is the leader's address and a word that no other process has.

    A leader that is gone lets go of nothing, so its time must be over before another one leads; one that ends in order
    empties ``holderIdentity``. One whose Lease was deleted may lead until it renews, so who finds none only makes one
    that nobody holds; whoever claims that has seen it unchanged for as long as a renewal holds. Every claim follows
    a version, and that one was there all the time from before the wait, so no deletion makes two lead.
    """

    def __init__(self, api: KubernetesApi, *, namespace: str, name: str, lease_s: float, clock: Clock) -> None:
        self._api = api
        self._path = f"/apis/{_GROUP}/namespaces/{namespace}/leases"
        self._namespace = namespace
        self._name = name
        self._lease_s = lease_s
        self._clock = clock
        self._tenure = Tenure(lease_s)
        self._watch = Watch(lease_s)
        self._word = uuid.uuid4().hex[:12]
        self._identity = ""
        # The epoch that is ours, claimed or held; 0: none. And the Lease as we last wrote it; None: not known.
        self._epoch = 0
        self._written: _Read | None = None
        self._renewed_us = 0
        self._leader = Holder()
        # The largest epoch that we know of: the Lease may have been deleted, and this machine's clock may be behind.
        self._former = 0
        # By whom stands by and is asked: the version of its word, as we saw it.
        self._asked = ("", "")

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed."""
        return self._tenure.until_s

    async def try_acquire(self, address: str) -> int | None:
        """Write our name into the Lease, unless it has another one's that is still renewed."""
        assert self.until_s == float("-inf"), "it leads already"
        self._identity = f"{address}_{self._word}"
        looked_s = self._clock.monotonic_s()
        found = await self._get()
        if found is None:
            await self._create()
            return None
        self._leader = found.holder
        self._former = max(self._former, found.holder.epoch)
        if self._may_lead(found, looked_s, self._clock.monotonic_s()):
            return None
        began_s = self._clock.monotonic_s()
        self._epoch = epoch = next_epoch(self._former, time.time_ns() // 1_000_000)
        answer = await self._write(found, self._identity)
        if answer.status in (404, 409):
            self._epoch = 0
            return None
        self._written = _Read(_body(answer, 200))
        if not self._tenure.begin(began_s, self._clock.monotonic_s()):
            await self._let_go()
            return None
        self._leader = self._written.holder
        return epoch

    async def renew(self) -> bool:
        """Write ``renewTime``, if it was still time to when that was done and the Lease is still in our name."""
        began_s = self._clock.monotonic_s()
        if not self._tenure.renewable(began_s):
            return False
        # Once more where somebody else wrote: not every change is a takeover.
        for _ in range(2):
            ours = await self._ours()
            if ours is None:
                return False
            self._written = None
            answer = await self._write(ours, self._identity)
            if answer.status == 201:
                return False  # it had been deleted
            if answer.status not in (404, 409):
                self._written = _Read(_body(answer, 200))
                return self._tenure.renew(began_s, self._clock.monotonic_s())
        raise OSError("somebody else writes the Lease all the time")

    @property
    def leader(self) -> Holder:
        """Who is named in the Lease, as last read; nobody where nobody is."""
        return self._leader

    @property
    def sees_leader(self) -> bool:
        """Whether the Lease was seen to change of late."""
        return self._watch.sees_leader(self._clock.monotonic_s())

    async def tell_asked(self) -> None:
        """Renew a Lease that is there for it."""
        answer = await self._put(await self._get(_ASKED), {"renewTime": self._now()}, {}, _ASKED)
        if answer.status != 409:  # somebody else told it
            _body(answer, 200, 201)

    async def other_asked(self) -> bool:
        """Whether that Lease has changed."""
        before, found = self._asked, await self._get(_ASKED)
        if found is not None:
            self._asked = found.version
        return self._asked != before

    async def release(self) -> None:
        """Take our name out, if it is still there and the API server can be reached."""
        self._tenure.end()
        with contextlib.suppress(OSError):
            await self._let_go()
        self._epoch = 0
        self._api.close()

    async def _create(self) -> None:
        """Make a Lease that nobody holds, for a claim to follow: only a claim that follows one is refused in time."""
        spec = {"leaseDurationSeconds": math.ceil(self._watch.holds_s)}
        answer = await self._put(None, spec, {EPOCH: str(self._former)})
        if answer.status == 404:
            raise FileNotFoundError(f"the API server knows no such namespace: {reason_of(answer)}")
        if answer.status != 409:  # somebody else made it
            _body(answer, 201)

    def _may_lead(self, found: _Read, looked_s: float, seen_s: float) -> bool:
        """Whether another one may lead, by a look that was begun and done at these times."""
        if not found.ever_held:
            # It was made where there was none, so the one before was perhaps deleted under a leader.
            return self._watch.may_lead_unseen(found.version, looked_s, seen_s, lease_s=found.lease_s)
        # One in our name is a claim of ours whose answer got lost, and by which we never led.
        theirs = found.identity not in ("", self._identity)
        return theirs and self._watch.leads(found.version, looked_s, seen_s, lease_s=found.lease_s)

    async def _let_go(self) -> None:
        if self._epoch and (ours := await self._ours()) is not None:
            self._written = None
            await self._write(ours, "")

    async def _ours(self) -> _Read | None:
        """The Lease as it is, where it is in the name of this leadership."""
        if self._written is None:
            self._written = await self._get()
        read = self._written
        return read if read is not None and (read.identity, read.holder.epoch) == self._mine else None

    @property
    def _mine(self) -> tuple[str, int]:
        return (self._identity, self._epoch)

    async def _get(self, suffix: str = "") -> _Read | None:
        """The Lease; None where there is none."""
        answer = await self._api.ask("GET", f"{self._path}/{self._name}{suffix}")
        return None if answer.status == 404 else _Read(_body(answer, 200))

    async def _write(self, former: _Read, identity: str) -> Answer:
        """Write who leads."""
        renewed = self._now()
        spec = {
            "holderIdentity": identity,
            "leaseDurationSeconds": math.ceil(self._lease_s),
            "renewTime": renewed,
        }
        if identity and (former.identity, former.holder.epoch) != self._mine:
            spec |= {"acquireTime": renewed, "leaseTransitions": former.transitions + 1}
        return await self._put(former, spec, {EPOCH: str(self._epoch)})

    async def _put(
        self, former: _Read | None, spec: Mapping[str, object], annotations: Mapping[str, str], suffix: str = ""
    ) -> Answer:
        """Make a Lease, or put it in the place of ``former`` and of nothing else."""
        name = f"{self._name}{suffix}"
        new: dict[str, Any] = {"metadata": {"name": name, "namespace": self._namespace}}
        whole = former.whole if former is not None else new
        # With its uid, or the API server would make a new one of an old version that was deleted.
        metadata = {**whole["metadata"], "annotations": {**(whole["metadata"].get("annotations") or {}), **annotations}}
        kind = {"apiVersion": _GROUP, "kind": "Lease"}
        body = msgspec.json.encode({**whole, **kind, "metadata": metadata, "spec": {**whole.get("spec", {}), **spec}})
        if former is None:
            return await self._api.ask("POST", self._path, body)
        return await self._api.ask("PUT", f"{self._path}/{name}", body)

    def _now(self) -> str:
        """Later each time: a write that changes nothing would make no new version, and the wall clock may go back."""
        self._renewed_us = max(self._renewed_us + 1, time.time_ns() // 1_000)
        return _micro_time(self._renewed_us)


def _body(answer: Answer, *expected: int) -> bytes:
    """The body of an answer of an expected status. Raises OSError for any other."""
    if answer.status in expected:
        return answer.body
    if answer.status in (401, 403):
        raise PermissionError(f"the API server refuses the service account: {reason_of(answer)}")
    raise OSError(f"the API server answers {reason_of(answer)}")


def _micro_time(since_1970_us: int) -> str:
    """As Kubernetes' MicroTime wants it: RFC 3339 with six digits behind the point."""
    seconds, micros = divmod(since_1970_us, 1_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{micros:06d}Z"
