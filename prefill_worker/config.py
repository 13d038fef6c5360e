"""Settings that only a prefill worker has. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec

from runtime.bounds import Positive, PositiveCount


class PrefillWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much KV is held for decode workers."""

    lease_s: Positive = 30.0
    """Time a decode worker has to pull the KV of a finished prefill."""
    lease_total_max_s: Positive = 120.0
    """Longest that KV is held over all renewals, however slow the pull; at least ``lease_s``."""
    leases_max: PositiveCount = 1_024
    """Leases held at once; further prefills are refused as exhausted."""
    kv_overcommit_factor: Positive = 8.0
    """KV blocks that admitted prompts and held leases may need together, as a multiple of what the engine has.
    More than 1, because prompts wait their turn in the engine's queue and their blocks soon move on."""

    def __post_init__(self) -> None:
        if self.lease_total_max_s < self.lease_s:
            raise ValueError("lease_total_max_s must not be less than lease_s")
