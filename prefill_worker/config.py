"""Settings that only a prefill worker has. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec


class PrefillWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much KV is held for decode workers."""

    lease_s: float = 30.0
    """Time a decode worker has to pull the KV of a finished prefill."""
    leases_max: int = 1_024
    """Leases held at once; further prefills are refused as exhausted."""
    kv_overcommit_factor: float = 8.0
    """KV blocks that admitted prompts and held leases may need together, as a multiple of what the engine has.
    More than 1, because prompts wait their turn in the engine's queue and their blocks soon move on."""
    retry_after_s: float = 1.0
    """Advice that goes with a refusal for lack of leases."""
