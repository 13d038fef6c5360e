"""Everything that differs between prefill and decode, as one class. Holds no engine and no stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from engine.protocol import EngineInfo, EngineRequest, Hold, TakeOver
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure
from runtime.roles import WorkerRole
from worker.leases import LeaseAction, LeaseTable


class WorkerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A Submit message as a value: what the engine is to do, and what this worker needs beside it.

    ``protos/worker/v1`` documents each field. ``deadline_s`` is the time left, and ``role`` the job that is asked for.
    The engine request has no transfer yet: the role decides it.
    """

    slot: int
    engine_request: EngineRequest
    role: WorkerRole
    handoff: KvHandoff | None = None
    deadline_s: float | None = None
    blocks_reserved: int = 0
    tell_work: bool = False

    @property
    def request_id(self) -> str:
        """Its id, unique for each attempt and stage."""
        return self.engine_request.request_id

    def accepted(self, transfer: Hold | TakeOver | None, blocks: int) -> Accepted:
        """The role takes it: the engine gets it with ``transfer``."""
        return Accepted(engine_request=msgspec.structs.replace(self.engine_request, transfer=transfer), blocks=blocks)


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """What the role makes of a request: what the engine is told, and the KV blocks it will need."""

    engine_request: EngineRequest
    blocks: int


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """The role does not take the request. ``reason`` is a short word for the counter."""

    failure: Failure
    reason: str


Offer = tuple[KvHandoff, Sequence[LeaseAction]]
"""A hand-off that may leave this process, and what is to be done about its lease."""


class RoleBehaviour:
    """One of the two jobs, and its leases. Pure: time is an argument, and the core carries out actions.

    What stands here is true of a role that keeps no KV for other workers: it has no lease.
    """

    name: WorkerRole
    blocks_limit: int
    """Blocks that admitted requests and held leases may need together."""

    def __init__(self) -> None:
        self.leases = LeaseTable()

    def accept(self, request: WorkerRequest) -> Accepted | Refused:
        """Judge a request for this role by what the role knows. The core judges size and room."""
        raise NotImplementedError

    def offer(self, handoff: KvHandoff, request: WorkerRequest, owner: int, now_s: float) -> Offer:
        """Put the engine's hand-off of ``request`` under a lease that belongs to the stream ``owner``."""
        raise AssertionError(f"the engine of a worker that keeps no KV offered {handoff.lease_id}")

    def released(self, lease_id: str, epoch: int, pulled: bool) -> Sequence[LeaseAction]:
        """A ReleaseHandoff message came. Idempotent; strangers' leases are ignored."""
        return ()

    def renewed(self, lease_id: str, epoch: int, now_s: float) -> Sequence[LeaseAction]:
        """A RenewHandoff message came. Idempotent; strangers' leases are ignored."""
        return ()


MakeRole = Callable[[EngineInfo, str], RoleBehaviour]
"""Builds the role from the engine's facts and the worker's id."""


def blocks_for(tokens: int, block_size_tokens: int) -> int:
    """KV blocks that ``tokens`` positions fill."""
    return -(-tokens // block_size_tokens)
