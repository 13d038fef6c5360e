"""News of KV blocks as values: what an engine says of its own, and what a worker says of them to the scheduler."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import msgspec

from kv_transfer.prefix.block_keys import Extras

EngineHash = bytes | int
"""An engine's own name for a block. Opaque: two engines may name the same block differently."""


class Medium(enum.IntEnum):
    """Where a block may lie, fastest first. There is room for eight (``scheduler/routing/prefix_index.py``)."""

    HBM = 0
    HOST = 1
    FILE = 2
    OBJECT = 3


OF_TIER = {"host": Medium.HOST, "file": Medium.FILE, "s3": Medium.OBJECT}
"""The medium of each kind of KV tier."""
GONE = len(Medium)
"""In place of a medium: on none."""


class BlocksStored(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of one chain are on a medium now. An engine that holds the same block twice says so twice."""

    hashes: Sequence[EngineHash]
    # The block before the first of ``hashes``; None: they begin a prompt.
    parent: EngineHash | None
    token_ids: Sequence[int]
    block_size_tokens: int
    medium: Medium = Medium.HBM
    lora: str = ""
    # Known where ``parent`` is None; later blocks have it through the chain.
    salt: str = ""
    extras: Sequence[Extras | None] = ()
    # Which of the engine's caches, where layers have different ones.
    group: int = 0


class BlocksRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of each of these blocks is no longer on a medium."""

    hashes: Sequence[EngineHash]
    medium: Medium = Medium.HBM
    group: int = 0


class BlocksCleared(msgspec.Struct, frozen=True):
    """The engine holds no block any more."""


class BlocksFound(msgspec.Struct, frozen=True, kw_only=True):
    """The engine can load these from a store. Another one may have written them, so their names in Baton come too."""

    hashes: Sequence[EngineHash]
    # The block before each; None: it begins a prompt.
    parents: Sequence[EngineHash | None]
    digests: Sequence[bytes]
    medium: Medium


EngineEvent = BlocksStored | BlocksRemoved | BlocksCleared | BlocksFound


def to_builtins(events: Sequence[BlocksFound | BlocksRemoved]) -> list[dict[str, Any]]:
    """For a message that knows no types."""
    return [msgspec.to_builtins(event, builtin_types=(bytes,)) for event in events]


def from_builtins(told: Sequence[dict[str, Any]]) -> list[EngineEvent]:
    """The events of such a message. Raises msgspec.ValidationError."""
    return [
        msgspec.convert(each, BlocksFound) if "digests" in each else msgspec.convert(each, BlocksRemoved)
        for each in told
    ]


class BlockDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What changed in the mirror of one engine since the delta with the number before.

    ``levels`` has packed keys under a medium m: from the prompt's start to that block all lies on m or faster mediums,
    and not all on the faster ones. Under ``GONE``: some block up to there lies nowhere.
    """

    epoch: int
    seq: int
    levels: dict[int, bytes]
    # All that was said before is void.
    reset: bool = False
    # The rest follows in the next delta. Until then the whole is not consistent.
    more: bool = False
    # Of a data-parallel engine.
    rank: int = 0
