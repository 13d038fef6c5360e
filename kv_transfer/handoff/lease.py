"""What is to be done about leases, as values. ``worker.leases`` decides it, a worker's core does it."""

from __future__ import annotations

import msgspec


class FreeBlocks(msgspec.Struct, frozen=True):
    """Tell the engine to give up the KV of this lease. Idempotent."""

    lease_id: str


class KeepBlocks(msgspec.Struct, frozen=True):
    """Tell the engine to hold the KV of this lease for so long from now. Idempotent."""

    lease_id: str
    lease_s: float


class Count(msgspec.Struct, frozen=True):
    """Something worth a counter happened."""

    what: str


LeaseAction = FreeBlocks | KeepBlocks | Count
