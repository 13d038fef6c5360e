"""The decode job: take over validated KV, or compute the prompt here, and generate to the end. Pure; holds no lease."""

from __future__ import annotations

from typing import assert_never

from decode_worker.config import DecodeLimits, DecodeWorkerConfig
from decode_worker.handoff_validator import HandoffValidator, KnownEpochs
from engine.protocol import EngineInfo, TakeOver
from runtime.failures import Failure, FailureKind
from worker.role import Accepted, Decode, Prefill, Refused, RoleBehaviour, WorkerRequest, blocks_for


class DecodeRole(RoleBehaviour):
    """The decode half of ``worker.role.RoleBehaviour``. It keeps no KV for other workers."""

    name = "decode"

    def __init__(
        self, config: DecodeWorkerConfig, info: EngineInfo, worker_id: str, limits: DecodeLimits | None = None
    ) -> None:
        super().__init__()
        self._info = info
        self._worker_id = worker_id
        limits = limits or DecodeLimits()
        self.validator = HandoffValidator(info=info, known_epochs=KnownEpochs(limits.known_epochs_max), limits=limits)
        self.blocks_limit = max(int(info.kv_blocks_total * config.kv_overcommit_factor), 1)

    def accept(self, request: WorkerRequest) -> Accepted | Refused:
        """Accept a decode if its hand-off, where it has one, is valid."""
        match request.work:
            case Decode(handoff=handoff):
                pass
            case Prefill():
                message = f"worker {self._worker_id} decodes; request {request.request_id} asks it to prefill"
                return Refused(failure=Failure(kind=FailureKind.INCOMPATIBLE, message=message), reason="wrong_role")
            case _:
                assert_never(request.work)
        needed = blocks_for(len(request.engine_request.token_ids), self._info.block_size_tokens)
        if needed > self._info.kv_blocks_total:
            message = f"the prompt needs {needed} KV blocks; worker {self._worker_id} has {self._info.kv_blocks_total}"
            return Refused(failure=Failure(kind=FailureKind.TOO_LARGE, message=message), reason="too_large")
        if handoff is not None and (refused := self.validator.judge(handoff, request)) is not None:
            return refused
        transfer = TakeOver(handoff) if handoff is not None else None
        return request.accepted(transfer, self.validator.blocks(request))
