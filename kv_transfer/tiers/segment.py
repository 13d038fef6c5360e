"""The form of a segment: an index that says what each block is, then the blocks. Opens nothing.

A segment is one file or one S3 object. It holds one rank's parts of blocks of one model and one scope, is written once
and never changed. The checksum of a block is the engine's own (``kv_transfer/integrity/block_checksums.py``), so
it is compared where the block is used.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

INDEX_BYTES = 16 << 10
"""Read with one request, whatever a segment holds."""
BLOCKS_MAX = 96
SEGMENT_BYTES_MAX = 32 << 20
CHECKSUM_BYTES = 8
SUFFIX = ".kv"
NO_SCOPE = "0" * 16
"""Of prompts without a cache salt."""
_MAGIC = b"BATONKV\x02"
_DIGEST_BYTES = 16
_LENGTH_BYTES = 4
_HEAD_BYTES = len(_MAGIC) + _DIGEST_BYTES + _LENGTH_BYTES
_NAME = re.compile(r"(?P<time>[0-9a-f]{11})-(?P<chance>[0-9a-f]{8})-(?P<scope>[0-9a-f]{16})-(?P<size>[0-9a-f]+)\.kv")


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One block: its key in vLLM, the hash of the block before it, its key in Baton, the tokens up to its end."""

    key: bytes
    group: int = 0
    """The engine's cache that it is of."""
    parent: bytes = b""
    """Empty: it begins a prompt."""
    digest: bytes = b""
    """Empty: routing is not told of it."""
    depth_tokens: int = 0
    checksum: bytes = b""


class Index(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What stands in front. ``entries`` are in the order of the blocks."""

    fingerprint: str
    """Of model, layout and all else that must agree between the engines that write and read."""
    scope: str
    rank: int
    ranks: int
    block_bytes: int
    regions: tuple[tuple[tuple[int, int], ...], ...]
    """By cache group: the parts of a block, as offset and bytes, that its checksum is of."""
    entries: tuple[Entry, ...]


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What people read of the segments of one fingerprint."""

    model: str
    vllm: str
    block_tokens: int
    block_bytes: int
    """Of all parts together."""
    parts: int
    """One for each rank."""


ABOUT = "about.json"
"""Name of the file beside the parts that has an ``About``."""


class SegmentName(msgspec.Struct, frozen=True):
    """What a name says: names sort by time, and a listing of names tells what a place holds."""

    scope: str
    size_bytes: int


class BadSegment(ValueError):
    """Why something is no segment that can be read."""


_decoder = msgspec.msgpack.Decoder(Index)


def encode(index: Index) -> bytes:
    """The ``INDEX_BYTES`` in front of the blocks."""
    assert 0 < len(index.entries) <= BLOCKS_MAX
    body = msgspec.msgpack.encode(index)
    head = _MAGIC + _digest(body) + len(body).to_bytes(_LENGTH_BYTES, "little")
    assert len(head) + len(body) <= INDEX_BYTES, "keys or layers of a length that no model has"
    return (head + body).ljust(INDEX_BYTES, b"\0")


def decode(page: bytes | memoryview, *, size_bytes: int) -> Index:
    """The index of a segment of ``size_bytes``. Raises BadSegment saying what is wrong with it."""
    page = bytes(page)
    if len(page) < INDEX_BYTES:
        raise BadSegment("cut off in its index")
    if not page.startswith(_MAGIC):
        raise BadSegment("no segment of this version")
    digest = page[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]
    length = int.from_bytes(page[_HEAD_BYTES - _LENGTH_BYTES : _HEAD_BYTES], "little")
    body = page[_HEAD_BYTES : _HEAD_BYTES + length]
    if len(body) != length or _digest(body) != digest:
        raise BadSegment("its index changed since it was written")
    index = _decoder.decode(body)
    if segment_bytes(len(index.entries), index.block_bytes) != size_bytes:
        raise BadSegment("not as long as its index says")
    return index


def offset(position: int, block_bytes: int) -> int:
    """Where a block begins."""
    return INDEX_BYTES + position * block_bytes


def segment_bytes(blocks: int, block_bytes: int) -> int:
    """The length of a segment."""
    return offset(blocks, block_bytes)


def blocks_in(capacity_bytes: int, block_bytes: int) -> int:
    """Blocks to put into one segment. An eighth of the capacity at most: a segment leaves as a whole."""
    room = min(SEGMENT_BYTES_MAX, capacity_bytes // 8) - INDEX_BYTES
    return max(1, min(BLOCKS_MAX, room // block_bytes))


def name(*, time_ms: int, chance: int, scope: str, size_bytes: int) -> str:
    """A new name. ``chance``: 32 bits, so that two writers never choose the same."""
    found = f"{time_ms:011x}-{chance:08x}-{scope}-{size_bytes:x}{SUFFIX}"
    assert parse_name(found) is not None, found
    return found


def parse_name(text: str) -> SegmentName | None:
    """What a name says. None: it is the name of something else."""
    found = _NAME.fullmatch(text)
    return None if found is None else SegmentName(found["scope"], int(found["size"], 16))


def created_ms(name: str) -> int:
    """When a segment was named, in milliseconds since 1970."""
    return int(name.partition("-")[0], 16)


def scope_of(salt: str) -> str:
    """The scope of prompts with this cache salt. The salt itself is written nowhere."""
    return hashlib.blake2b(salt.encode(), digest_size=8).hexdigest() if salt else NO_SCOPE


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
