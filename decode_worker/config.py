"""Settings that only a decode worker has. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec

from runtime.bounds import Count, NonNegative, Positive, PositiveCount


class DecodeWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on the hand-offs that the worker takes over, and on the use of its KV cache."""

    lease_margin_s: NonNegative = 1.0
    """A hand-off with less time left than this is refused: the pull might outlive the lease."""
    holders_max: PositiveCount = 4_096
    """Prefill workers whose newest epoch is remembered."""
    output_headroom_tokens: Count = 256
    """Output tokens that admission counts per request, beside its prompt, when the scheduler reserved nothing."""
    kv_overcommit_factor: Positive = 1.0
    """KV blocks that admitted requests may need together, as a multiple of what the engine has."""
