"""Which cells are measured of an engine, from what it can hold. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.protocol import EngineInfo

PREFILL_MIN_TOKENS, PREFILL_MAX_TOKENS = 32, 16_384
CACHED_TOKENS = (1024, 4096, 16_384)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 512, 4096)
PULLS = (1, 2, 4)
HANDOFF_TOKENS = (256, 1024, 4096)
DECODE_STEPS = 24
"""Of each decode cell; the contexts grow by so many tokens."""
PREFILLED_MAX_TOKENS = 262_144
"""Prompts that must be computed before the steps of a decode cell can be measured: more would take minutes."""


class Prefill(msgspec.Struct, frozen=True):
    """A prompt of which so many tokens are held already."""

    uncached_tokens: int
    cached_tokens: int


class Decode(msgspec.Struct, frozen=True):
    """So many sequences, each with a prompt of ``context_tokens``."""

    requests: int
    context_tokens: int


class Handoff(msgspec.Struct, frozen=True):
    """So many pulls at once, each of the KV of a prompt."""

    pulls: int
    tokens: int


Cell = Prefill | Decode | Handoff


def prefills(info: EngineInfo) -> list[Prefill]:
    """Prompt lengths by factors of 2, and some of them behind a cached beginning of whole blocks."""
    longest = min(_context_max(info) - 2, info.kv_blocks_total * info.block_size_tokens // 2)
    lengths, tokens = [], PREFILL_MIN_TOKENS
    while tokens <= min(longest, PREFILL_MAX_TOKENS):
        lengths.append(tokens)
        tokens *= 2
    found = [Prefill(each, 0) for each in lengths]
    for cached in CACHED_TOKENS:
        whole = cached // info.block_size_tokens * info.block_size_tokens
        found += [Prefill(each, whole) for each in lengths[2::2] if whole and each + whole <= longest]
    return found


def decodes(info: EngineInfo, sequences_max: int) -> list[Decode]:
    """Batches by factors of 2, with short and long contexts, as far as their KV fits."""
    room = info.kv_blocks_total * 9 // 10
    return [
        Decode(batch, context)
        for context in CONTEXTS
        for batch in BATCHES
        if batch <= sequences_max
        and context + DECODE_STEPS + 2 <= _context_max(info)
        and batch * (-(-(context + DECODE_STEPS + 2) // info.block_size_tokens)) <= room
        and batch * context <= PREFILLED_MAX_TOKENS
    ]


def handoffs(info: EngineInfo) -> Sequence[Handoff]:
    """Pulls alone and together, of short and long prompts."""
    room = info.kv_blocks_total * 9 // 10
    return [
        Handoff(pulls, tokens)
        for tokens in HANDOFF_TOKENS
        for pulls in PULLS
        if tokens + 2 <= _context_max(info) and pulls * (-(-tokens // info.block_size_tokens) + 1) <= room
    ]


def _context_max(info: EngineInfo) -> int:
    return info.context_tokens_max or PREFILL_MAX_TOKENS * 2
