"""Validates a hand-off, and counts the blocks that its request needs, before the engine sees it. Pure.

Wrong KV must never become an answer. So a hand-off that cannot be proved right is refused, and the prompt is computed
again.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from decode_worker.config import DecodeLimits
from engine.protocol import EngineInfo
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.handoff.layout import incompatible
from kv_transfer.integrity.prompt_digest import prompt_digest
from runtime.failures import Failure, FailureKind
from worker.role import Refused, WorkerRequest, blocks_for


class KnownEpochs:
    """The newest epoch seen of each prefill worker. Epochs only grow, so an older one belongs to a dead engine."""

    def __init__(self, workers_max: int) -> None:
        assert workers_max >= 1
        self._workers_max = workers_max
        self._epoch_of: OrderedDict[str, int] = OrderedDict()

    def newest(self, worker_id: str, epoch: int) -> int:
        """Remember ``epoch`` and return the newest one of this worker. Forgets the worker that was seen longest ago."""
        newest = max(epoch, self._epoch_of.pop(worker_id, 0))
        self._epoch_of[worker_id] = newest
        if len(self._epoch_of) > self._workers_max:
            self._epoch_of.popitem(last=False)
        return newest


class HandoffValidator(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that a hand-off must agree with."""

    info: EngineInfo
    known_epochs: KnownEpochs
    limits: DecodeLimits

    def judge(self, handoff: KvHandoff, request: WorkerRequest) -> Refused | None:
        """None when the engine may take the KV over."""
        block, token_ids = self.info.block_size_tokens, request.engine_request.token_ids
        wrong = incompatible(self.info.layout_fingerprint, handoff.layout_fingerprint)
        if wrong is not None:
            return _refused(FailureKind.INCOMPATIBLE, "handoff_layout", handoff, wrong)
        if not (handoff.worker_id and handoff.epoch and handoff.lease_id and handoff.engine_id):
            return _refused(
                FailureKind.STATE_LOST, "handoff_incomplete", handoff, "it names no worker, epoch, lease or engine"
            )
        newest = self.known_epochs.newest(handoff.worker_id, handoff.epoch)
        if handoff.epoch != newest:
            text = f"it is of epoch {handoff.epoch}, and {handoff.worker_id} is at {newest}"
            return _refused(FailureKind.STATE_LOST, "handoff_epoch", handoff, text)
        margin_s = self.limits.lease_margin_s
        if handoff.lease_remaining_s <= margin_s:
            text = f"{handoff.lease_remaining_s:.3f} s are left of its lease, and a pull may take {margin_s} s"
            return _refused(FailureKind.STATE_LOST, "handoff_expired", handoff, text)
        if not 0 < handoff.tokens <= len(token_ids):
            text = f"it covers {handoff.tokens} tokens of a prompt of {len(token_ids)}"
            return _refused(FailureKind.STATE_LOST, "handoff_length", handoff, text)
        digest = prompt_digest(
            token_ids[: handoff.tokens], cache_salt=request.engine_request.cache_salt, model=self.info.model
        )
        if handoff.prompt_digest != digest:
            # Never the tokens: a log must not hold a prompt.
            return _refused(FailureKind.STATE_LOST, "handoff_prompt", handoff, "it is of another prompt")
        # More blocks are possible: a model with several kinds of attention keeps blocks for each.
        if handoff.blocks < blocks_for(handoff.tokens, block):
            text = f"it names {handoff.blocks} blocks for {handoff.tokens} tokens in blocks of {block}"
            return _refused(FailureKind.STATE_LOST, "handoff_blocks", handoff, text)
        return None

    def blocks(self, request: WorkerRequest) -> int:
        """Blocks the request is admitted with: what the scheduler reserved, else prompt and some output."""
        tokens = len(request.engine_request.token_ids)
        context_tokens = max(self.info.context_tokens_max, tokens)
        expected = blocks_for(
            min(tokens + self.limits.output_headroom_tokens, context_tokens), self.info.block_size_tokens
        )
        return min(max(request.blocks_reserved or expected, 1), self.info.kv_blocks_total)


def _refused(kind: FailureKind, reason: str, handoff: KvHandoff, text: str) -> Refused:
    message = f"hand-off {handoff.lease_id or '?'} of {handoff.worker_id or '?'} is refused: {text}"
    return Refused(failure=Failure(kind=kind, message=message), reason=reason)
