"""Settings and limits that only a decode worker has. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec

from runtime.bounds import Positive


class DecodeWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the KV cache is used."""

    kv_overcommit_factor: Positive = 1.0
    """KV blocks that admitted requests may need together, as a multiple of what the engine has. Above 1 the engine
    may preempt requests. Watch ``baton_worker_kv_blocks_used``."""


class DecodeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What no operator needs to choose. Tests and the simulation hand in others."""

    lease_margin_s: float = 1.0
    """A hand-off with less time left than this is refused: the pull might outlive the lease."""
    known_epochs_max: int = 4_096
    """Prefill workers whose newest epoch is remembered."""
    output_headroom_tokens: int = 256
    """Output tokens that admission counts for a request, beside its prompt, when the scheduler reserved nothing."""
