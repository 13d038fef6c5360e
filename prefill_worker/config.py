"""Settings and limits that only a prefill worker has. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec

from runtime.bounds import Positive, PositiveCount


class PrefillWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much KV is held for decode workers."""

    lease_s: Positive = 30.0
    """Time a decode worker has to pull the KV of a finished prefill. Front proxies renew it while decode waits.
    Watch ``baton_worker_lease_events_total{event="expired"}``."""
    leases_max: PositiveCount = 1_024
    """Leases held at once; further prefills are refused as exhausted. Watch ``baton_worker_leases_held``."""


class PrefillLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What no operator needs to choose. Tests and the simulation hand in others."""

    lease_total_max_s: float = 120.0
    """Longest that KV is held over all renewals, however slow the pull; never less than ``lease_s``."""
    kv_overcommit_factor: float = 8.0
    """KV blocks that admitted prompts and held leases may need together, as a multiple of what the engine has.
    More than 1, because prompts wait in the engine's queue and their blocks soon move on."""
