"""Settings that only a prefill worker has. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec


class PrefillWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much KV is held for decode workers."""

    lease_s: float = 30.0
    """Time a decode worker has to pull the KV of a finished prefill."""
    leases_max: int = 1_024
    """Leases held at once; further prefills are refused as exhausted."""
    lease_tick_s: float = 0.25
    """How often leases are looked through for ones that ran out."""
    kv_headroom_fraction: float = 0.0
    """Part of the KV blocks that admission leaves free."""
