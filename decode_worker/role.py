"""The decode job: take over validated KV, or compute the prompt here, and generate to the end. Pure; holds no lease."""

from __future__ import annotations

from decode_worker.config import DecodeLimits, DecodeWorkerConfig
from decode_worker.handoff_validator import HandoffValidator, KnownEpochs
from engine.protocol import EngineInfo, TakeOver
from worker.role import Accepted, Refused, RoleBehaviour, WorkerRequest


class DecodeRole(RoleBehaviour):
    """The decode half of ``worker.role.RoleBehaviour``. It keeps no KV for other workers."""

    name = "decode"

    def __init__(
        self, config: DecodeWorkerConfig, info: EngineInfo, worker_id: str, limits: DecodeLimits | None = None
    ) -> None:
        super().__init__()
        limits = limits or DecodeLimits()
        self.validator = HandoffValidator(info=info, known_epochs=KnownEpochs(limits.known_epochs_max), limits=limits)
        self.blocks_limit = max(int(info.kv_blocks_total * config.kv_overcommit_factor), 1)

    def accept(self, request: WorkerRequest) -> Accepted | Refused:
        """Accept a decode if its hand-off, where it has one, is valid."""
        if request.handoff is None:
            return request.accepted(None, self.validator.blocks(request))
        refused = self.validator.judge(request.handoff, request)
        return refused or request.accepted(TakeOver(request.handoff), self.validator.blocks(request))
