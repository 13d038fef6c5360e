"""The prefill job: compute a prompt, hold its KV under a lease, give out a hand-off. Pure; frees nothing itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.protocol import EngineInfo, Hold
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.integrity.prompt_digest import prompt_digest
from prefill_worker.config import PrefillLimits, PrefillWorkerConfig
from runtime.failures import Failure, FailureKind
from worker.leases import Count, LeaseAction
from worker.role import Accepted, Offer, Refused, RoleBehaviour, WorkerRequest, blocks_for


class PrefillRole(RoleBehaviour):
    """The prefill half of ``worker.role.RoleBehaviour``."""

    name = "prefill"

    def __init__(
        self, config: PrefillWorkerConfig, info: EngineInfo, worker_id: str, limits: PrefillLimits | None = None
    ) -> None:
        super().__init__()
        limits = limits or PrefillLimits()
        self._config = config
        self._lease_total_max_s = max(limits.lease_total_max_s, config.lease_s)
        self._info = info
        self._worker_id = worker_id
        self.blocks_limit = max(int(info.kv_blocks_total * limits.kv_overcommit_factor), 1)

    def accept(self, request: WorkerRequest) -> Accepted | Refused:
        """Accept a prefill if a lease is left for it."""
        if request.request_id in self.leases:
            # Engines name a lease after its request: a second one would free the first one's KV.
            message = f"the KV of an earlier request {request.request_id} is still held"
            return Refused(failure=Failure(kind=FailureKind.BAD_REQUEST, message=message), reason="request_id")
        if len(self.leases) >= self._config.leases_max:
            message = f"worker {self._worker_id} holds {len(self.leases)} hand-offs that are not pulled yet"
            return Refused(failure=Failure(kind=FailureKind.EXHAUSTED, message=message), reason="leases_max")
        blocks = blocks_for(len(request.engine_request.token_ids), self._info.block_size_tokens)
        return request.accepted(Hold(self._config.lease_s), blocks)

    def offer(self, handoff: KvHandoff, request: WorkerRequest, owner: int, now_s: float) -> Offer:
        """Start the lease now. The engine's own began a moment before and may end as much before.

        A pull in between is not proved.
        """
        assert 0 < handoff.tokens <= len(request.engine_request.token_ids), (handoff.tokens, request.request_id)
        lease_s = min(handoff.lease_remaining_s, self._config.lease_s)
        blocks = handoff.blocks or blocks_for(handoff.tokens, self._info.block_size_tokens)
        actions = self.leases.offer(
            handoff.lease_id, owner=owner, blocks=blocks, now_s=now_s, expires_at_s=now_s + lease_s
        )
        offered = msgspec.structs.replace(
            handoff,
            worker_id=self._worker_id,
            epoch=self._info.epoch,
            engine_id=self._info.engine_id,
            blocks=blocks,
            bytes=handoff.bytes or blocks * self._info.block_bytes,
            layout_fingerprint=self._info.layout_fingerprint,
            lease_remaining_s=lease_s,
            prompt_digest=prompt_digest(
                request.engine_request.token_ids[: handoff.tokens],
                cache_salt=request.engine_request.cache_salt,
                model=self._info.model,
            ),
        )
        return offered, actions

    def released(self, lease_id: str, epoch: int, pulled: bool) -> Sequence[LeaseAction]:
        """A release of another epoch's lease is ignored, even where the ids are equal."""
        if epoch != self._info.epoch:
            return ()
        return self.leases.pulled(lease_id) if pulled else self.leases.release(lease_id)

    def renewed(self, lease_id: str, epoch: int, now_s: float) -> Sequence[LeaseAction]:
        """The receiver of the hand-off still waits. A renewal of another epoch's lease is only counted."""
        if epoch != self._info.epoch:
            return (Count("renewed_too_late"),)
        return self.leases.renew(
            lease_id, now_s=now_s, lease_s=self._config.lease_s, total_max_s=self._lease_total_max_s
        )
