"""Settings that only a decode worker has. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec


class DecodeWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How picky the worker is about a hand-off, and how full it lets its KV cache become."""

    lease_margin_s: float = 1.0
    """A hand-off with less time left than this is refused: the pull might outlive the lease."""
    holders_max: int = 4_096
    """Prefill workers whose newest epoch is remembered."""
    kv_headroom_fraction: float = 0.0
    """Part of the KV blocks that admission leaves free."""
