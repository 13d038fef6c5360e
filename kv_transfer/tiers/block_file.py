"""The form of a KV block in a file: a header of one page that says what the block is, then the block. Reads no file.

What a header says is compared with what is looked for: another block, another model or layout, another rank, a file of
another length or content is not read as this block.
"""

from __future__ import annotations

import enum
import struct
import zlib

import msgspec

HEADER_BYTES = 4096
_MAGIC = b"BATONKV\x01"
# Magic, fingerprint, key's length, key, rank, ranks, payload bytes, payload's CRC, checksum of the engine's block.
_FIELDS = struct.Struct("<8s32sH64sHHQI8s")
_CRC = struct.Struct("<I")
_KEY_BYTES_MAX = 64


class Fault(enum.Enum):
    """Why a file does not hold the block that is looked for."""

    TRUNCATED = "truncated"
    NO_HEADER = "no header of this version"
    OTHER_MODEL = "of another model or layout"
    OTHER_BLOCK = "of another block"
    CHANGED = "changed since it was written"


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """What a block is: the model and layout, its key in vLLM, and which rank's part."""

    fingerprint: bytes
    key: bytes
    rank: int = 0
    ranks: int = 1


def header(label: Label, payload: memoryview | bytes, checksum: bytes) -> bytes:
    """The page in front of ``payload``. ``checksum``: of the block where the engine held it."""
    assert len(label.fingerprint) == 32 and len(label.key) <= _KEY_BYTES_MAX and len(checksum) == 8
    fields = _FIELDS.pack(
        _MAGIC,
        label.fingerprint,
        len(label.key),
        label.key,
        label.rank,
        label.ranks,
        len(payload),
        zlib.crc32(payload),
        checksum,
    )
    return (fields + _CRC.pack(zlib.crc32(fields))).ljust(HEADER_BYTES, b"\0")


def check(label: Label, page: memoryview | bytes, payload: memoryview | bytes) -> bytes | Fault:
    """The checksum that the header has, if page and payload are the block that ``label`` says."""
    if len(page) < HEADER_BYTES:
        return Fault.TRUNCATED
    fields = bytes(page[: _FIELDS.size])
    magic, fingerprint, key_bytes, key, rank, ranks, length, crc, checksum = _FIELDS.unpack(fields)
    if magic != _MAGIC or _CRC.unpack_from(page, _FIELDS.size)[0] != zlib.crc32(fields):
        return Fault.NO_HEADER
    if fingerprint != label.fingerprint:
        return Fault.OTHER_MODEL
    if (key[:key_bytes], rank, ranks) != (label.key, label.rank, label.ranks):
        return Fault.OTHER_BLOCK
    if length != len(payload):
        return Fault.TRUNCATED
    return bytes(checksum) if zlib.crc32(payload) == crc else Fault.CHANGED


def name(key: bytes) -> str:
    """The file's name: of hexadecimal digits alone, whatever is in a key."""
    return key.hex()


def key_of(name: str) -> bytes | None:
    """The key in a name of ``name``; None: it is no such name."""
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return key if key and key.hex() == name else None
