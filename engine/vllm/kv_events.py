"""vLLM's KV events, from its bytes to Baton's values. Reads the format only; vLLM itself is not imported.

Left out is what no prompt's prefix is found by: caches that do not keep all tokens (sliding window, Mamba), and stores
that several engines share, which vLLM reports no removal from.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kv_transfer.prefix.block_keys import Extras
from kv_transfer.prefix.events import BlocksCleared, BlocksRemoved, BlocksStored, EngineEvent, EngineHash, Medium

_MEDIUMS = {None: Medium.HBM, "GPU": Medium.HBM, "CPU": Medium.HOST}
_WHOLE_PROMPT = {None, "full_attention", "mla_attention", "sink_full_attention"}


class BlockStored(msgspec.Struct, tag=True):
    """vLLM's event of this name; fields that Baton does not read are left out."""

    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[object] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """vLLM's event of this name."""

    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """vLLM's event of this name."""


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(_Batch)


def decode(payload: bytes) -> list[EngineEvent] | None:
    """The events of one batch. None if it cannot be read, which counts as a lost one."""
    try:
        batch = _decoder.decode(payload)
    except msgspec.MsgspecError:
        return None
    return [event for each in batch.events if (event := _event(each)) is not None]


def _event(event: BlockStored | BlockRemoved | AllBlocksCleared) -> EngineEvent | None:
    if isinstance(event, AllBlocksCleared):
        return BlocksCleared()
    medium = _MEDIUMS.get(event.medium)
    if medium is None:
        return None
    group = event.group_idx or 0
    if isinstance(event, BlockRemoved):
        return BlocksRemoved(hashes=event.block_hashes, medium=medium, group=group)
    if event.kv_cache_spec_kind not in _WHOLE_PROMPT:
        return None
    lora, keys = event.lora_name or "", event.extra_keys or ()
    return BlocksStored(
        hashes=event.block_hashes,
        parent=event.parent_block_hash,
        token_ids=event.token_ids,
        block_size_tokens=event.block_size,
        medium=medium,
        lora=lora,
        salt=_salt(keys, lora) if event.parent_block_hash is None else "",
        extras=[_media(each) for each in keys],
        group=group,
    )


def _salt(keys: Sequence[Sequence[object] | None], lora: str) -> str:
    """The cache salt of a prompt's first block. The only other text among its keys is the LoRA's name, in front."""
    texts = [key for key in keys[0] or () if isinstance(key, str)] if keys else []
    return texts[-1] if len(texts) > bool(lora) else ""


def _media(keys: Sequence[object] | None) -> Extras | None:
    return [key for key in keys or () if not isinstance(key, str)] or None
