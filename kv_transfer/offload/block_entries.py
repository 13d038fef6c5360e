"""What a store's index and routing are told of blocks: names in vLLM, names in Baton. Converts values only."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_offload.base import (
    OffloadKey,
    ReqContext,
    get_offload_block_hash,
    get_offload_group_idx,
)

from kv_transfer.offload import private
from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import OF_TIER, BlocksFound, BlocksRemoved, EngineHash
from kv_transfer.stores.tier import Told
from kv_transfer.tiers.segment import Entry

if TYPE_CHECKING:
    from vllm.v1.request import Request


def entries_of(request: Request, context: ReqContext, block_tokens: int) -> dict[bytes, Entry]:
    """The blocks of a request, by key. ``block_tokens``: 0 where routing knows no block of this model by its tokens."""
    digests: list[bytes] = []
    if block_tokens and not request.mm_features:
        lora = request.lora_request.lora_name if request.lora_request is not None else ""
        root = block_keys.root(lora=lora, salt=request.cache_salt or "")
        digests = block_keys.extend(root, request.all_token_ids, block_tokens)
    chains: dict[int, list[tuple[int, OffloadKey]]] = {}
    for key in private.keys_of(context):
        end = context.get_offload_key_position(key) or 0
        chains.setdefault(get_offload_group_idx(key), []).append((end, key))
    found: dict[bytes, Entry] = {}
    for group, chain in chains.items():
        chain.sort()
        for before, (end, key) in pairwise([(0, None), *chain]):
            place = end // block_tokens - 1 if block_tokens else -1
            digest = digests[place] if 0 <= place < len(digests) else b""
            parent = get_offload_block_hash(before[1]) if before[1] is not None else b""
            found[key] = Entry(key, group, parent, digest, end)
    return found


def events_of(kind: str, told: Told) -> list[BlocksFound | BlocksRemoved]:
    """What came and went in a store of this kind."""
    medium, events = OF_TIER[kind], list[BlocksFound | BlocksRemoved]()
    if told.went:
        events.append(BlocksRemoved(hashes=[_name(key) for key in told.went], medium=medium))
    if told.came:
        events.append(
            BlocksFound(
                hashes=[_name(entry.key) for entry in told.came],
                parents=[_hash(entry.parent) if entry.parent else None for entry in told.came],
                digests=[entry.digest for entry in told.came],
                medium=medium,
            )
        )
    return events


def _name(key: bytes) -> EngineHash:
    return _hash(get_offload_block_hash(OffloadKey(key)))


def _hash(block_hash: bytes) -> EngineHash:
    return maybe_convert_block_hash(block_hash)
