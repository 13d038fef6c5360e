"""What a tier says of itself: for metrics, `baton status` and `baton kv stat`. Holds values only."""

from __future__ import annotations

import msgspec

REPORTED_AS = "baton_tiers"
"""Key of the tiers' statuses in what a connector reports with a step."""
BLOCKS_REPORTED_AS = "baton_tier_blocks"
"""Key of the blocks that came and went in stores since the last report, as events."""


class TierStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One tier of one engine. What is counted only grows, and counts blocks."""

    name: str
    blocks: int = 0
    bytes: int = 0
    capacity_bytes: int = 0
    hits: int = 0
    """Blocks that the engine loaded instead of computing them."""
    misses: int = 0
    """Blocks that requests asked for, that were not in the engine's memory, and that it computed."""
    stored: int = 0
    evicted: int = 0
    corrupt: int = 0
    """Blocks whose content was not what was stored. Their prompts were computed."""
    declined: int = 0
    """Blocks that were here and were computed all the same, because computing them takes less time."""
    ahead: int = 0
    """Blocks that were read while their request waited its turn in the engine."""
    ahead_unused: int = 0
    """Of these, blocks that their request did not load then."""
    on: bool = True
    why_off: str = ""
    """Why it is not used now."""
    read_bytes_per_s: float = 0.0
    """Of the latest load. 0: none yet."""
    load_s: float = 0.0
    token_load_s: float = 0.0
    """A load of n tokens is expected to take ``load_s + n * token_load_s``. Both 0: nothing was loaded yet."""
