"""The key of a KV block: seven bytes over the block's tokens and all that stands before it. Keeps no token.

Front proxies compute the keys of a prompt, and workers those of their engine's blocks. Both must get the same keys, so
both call ``extend``. A key is a name for predictions. What an engine may reuse is decided by the engine's own hash.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

DIGEST_BYTES = 7
"""One byte less than a packed key: an integer below 2**60 takes 32 bytes of memory in CPython, a larger one 48."""
KEY_BYTES = 8
"""A packed key: the digest as a little-endian number."""
_TOKEN_BYTES = 4

Extras = Sequence[object]
"""What a block's KV depends on beside its tokens: ``(media id, offset from the block's start)`` of each media item."""


class Media(NamedTuple):
    """An image or the like in a prompt: its content's id, and where its placeholder tokens lie."""

    identifier: str
    offset_tokens: int
    length_tokens: int


def root(*, lora: str = "", salt: str = "") -> bytes:
    """The digest that the first block of a prompt is chained to. ``salt``: only prompts with the same one share KV."""
    return hashlib.blake2b(msgspec.msgpack.encode((lora, salt)), digest_size=DIGEST_BYTES).digest()


def extend(
    parent: bytes, token_ids: Sequence[int], block_size_tokens: int, extras: Sequence[Extras | None] = ()
) -> list[bytes]:
    """The digests of the full blocks of ``token_ids``, which follow the block ``parent``.

    ``extras``: of each block, or empty if no block has any. Raises OverflowError for a token that is negative or does
    not fit 32 bits.
    """
    tokens = array("I", token_ids)
    assert tokens.itemsize == _TOKEN_BYTES
    if sys.byteorder == "big":
        tokens.byteswap()
    data, width = tokens.tobytes(), block_size_tokens * _TOKEN_BYTES
    hasher, digests = hashlib.blake2b, []
    for index, start in enumerate(range(0, len(data) - width + 1, width)):
        block = data[start : start + width]
        if extras and (extra := extras[index]):
            # Behind the tokens, whose length is fixed: no two different blocks feed the same bytes.
            block += msgspec.msgpack.encode(extra)
        # As salt the parent costs nothing; in front of the tokens it would fill one more unit of the hash.
        parent = hasher(block, digest_size=DIGEST_BYTES, salt=parent).digest()
        digests.append(parent)
    return digests


def prompt_keys(
    token_ids: Sequence[int],
    block_size_tokens: int,
    *,
    lora: str = "",
    salt: str = "",
    media: Sequence[Media] = (),
) -> bytes:
    """The packed keys of a prompt's full blocks, in order. 1,000 tokens in blocks of 32 take about 25 us."""
    starts = range(0, len(token_ids), block_size_tokens) if media else ()
    extras = [_media_in(media, start, block_size_tokens) for start in starts]
    return pack(extend(root(lora=lora, salt=salt), token_ids, block_size_tokens, extras))


def pack(digests: Sequence[bytes]) -> bytes:
    """Eight bytes for each digest."""
    return b"\0".join(digests) + b"\0" if digests else b""


def pack_keys(keys: Sequence[int]) -> bytes:
    """The same from keys as numbers."""
    return struct.pack(f"<{len(keys)}Q", *keys)


def unpack(packed: bytes) -> tuple[int, ...]:
    """Keys as numbers. Raises ValueError if ``packed`` has another length than whole keys have."""
    if len(packed) % KEY_BYTES:
        raise ValueError(f"packed block keys have {KEY_BYTES} bytes each, these are {len(packed)}")
    return struct.unpack(f"<{len(packed) // KEY_BYTES}Q", packed)


def view(packed: bytes) -> Sequence[int]:
    """The same without unpacking: a key becomes a number when it is read. For those who read few of many."""
    return memoryview(packed).cast("Q") if sys.byteorder == "little" else unpack(packed)


def _media_in(media: Sequence[Media], start: int, length: int) -> Extras | None:
    end = start + length
    return [
        (each.identifier, each.offset_tokens - start)
        for each in media
        if each.offset_tokens < end and start < each.offset_tokens + each.length_tokens
    ] or None
