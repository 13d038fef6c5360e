"""What a worker says about itself, as values. Holds no opinion and no history."""

from __future__ import annotations

import enum

import msgspec

from runtime.roles import WorkerRole


class WorkerState(enum.StrEnum):
    """Life of a worker process, as it reports it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and capacity; ``protos/cluster/v1`` documents each field.

    In one epoch only role and registration change.
    """

    worker_id: str
    role: WorkerRole
    address: str
    epoch: int
    model: str
    layout_fingerprint: str
    block_size_tokens: int
    kv_blocks_total: int
    engine_version: str
    context_tokens_max: int = 0
    block_bytes: int = 0
    requests_max: int = 0
    pid: int = 0
    metrics_address: str = ""
    output_settings: str = ""
    prefill_backoff_tokens: int = 0
    topology: str = ""
    registration: int = 0
    start_s: float = 0.0
    ranks: int = 0

    @property
    def rank_count(self) -> int:
        """Data-parallel ranks of its engine; workers of former versions do not say that they have one."""
        return max(1, self.ranks)


class LoadCost(msgspec.Struct, frozen=True, gc=False):
    """What a load of KV from a medium takes: ``base_s`` and ``token_s`` for each token."""

    medium: int
    base_s: float = 0.0
    token_s: float = 0.0


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a worker is doing now; ``protos/cluster/v1`` documents each field."""

    state: WorkerState = WorkerState.STARTING
    requests_running: int = 0
    requests_waiting: int = 0
    kv_blocks_used: int = 0
    leases_held: int = 0
    kv_bytes_in: int = 0
    kv_bytes_out: int = 0
    prefill_tokens_queued: int = 0
    load_costs: tuple[LoadCost, ...] = ()
    # What each of several ranks is doing, as if it were a worker.
    ranks: tuple[WorkerLoad, ...] = ()
