"""Encryption of segments at rest: AES-256-GCM, a key for each scope and from it one for each segment. Opens no store.

Index and blocks are encrypted; where a segment lies, its name (time, scope, size) and which key it was are not. A
segment's own key is derived with random bytes that stand in front of it and with where it lies. So a count of its parts
is a nonce that no key sees twice, and a part that was changed, moved or swapped does not open. What proves the blocks
stands in the index: blocks are as long, and lie, as without encryption.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kv_transfer.stores.key_file import KEY_BYTES, encryption_key
from kv_transfer.tiers.segment import BLOCKS_MAX, INDEX_BYTES, BadSegment, parse_name

if TYPE_CHECKING:
    from kv_transfer.tiers.config import Tier

_MAGIC = b"BATONKV\x03"
_NAME_BYTES = 8
_SALT_BYTES = 32
_HEAD_BYTES = len(_MAGIC) + _NAME_BYTES + _SALT_BYTES
_TAG_BYTES = 16
_TAGS_BYTES = BLOCKS_MAX * _TAG_BYTES
_BODY_BYTES = INDEX_BYTES - _HEAD_BYTES - _TAG_BYTES
_NONCE_BYTES = 12


class OtherKey(BadSegment):
    """A segment that may be right, and that this key does not open."""


class Sealer:
    """What one key file opens and closes."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._key = key
        self._name = _derived(key, b"name")[:_NAME_BYTES]

    @property
    def name(self) -> str:
        """Tells keys apart, and says nothing of them."""
        return self._name.hex()

    def seal(self, where: str, page: bytes, blocks: Sequence[memoryview], into: memoryview) -> bytes:
        """Encrypt the blocks of a segment into ``into``, one after the other; what is to stand in front of them.

        ``where``: fingerprint, rank and name.
        """
        head = _MAGIC + self._name + os.urandom(_SALT_BYTES)
        key, at, tags = self._segment_key(where, head), 0, b""
        for place, block in enumerate(blocks):
            tags += _encrypt(key, place + 1, head, block, into[at : at + len(block)])
            at += len(block)
        kept, left = page[: _BODY_BYTES - _TAGS_BYTES], page[_BODY_BYTES - _TAGS_BYTES :]
        assert not any(left), "keys or layers of a length that no model has"
        body = bytearray(_BODY_BYTES)
        tag = _encrypt(key, 0, head, tags.ljust(_TAGS_BYTES, b"\0") + kept, memoryview(body))
        return head + body + tag

    def open(self, where: str, sealed: bytes | memoryview) -> Opened:
        """What stands in front of a segment. Raises BadSegment."""
        sealed = bytes(sealed)
        if not is_sealed(sealed):
            raise BadSegment("not encrypted, or cut off in its index")
        head = sealed[:_HEAD_BYTES]
        if head[len(_MAGIC) : len(_MAGIC) + _NAME_BYTES] != self._name:
            raise OtherKey("encrypted with another key")
        key, body = self._segment_key(where, head), bytearray(sealed[_HEAD_BYTES:-_TAG_BYTES])
        _decrypt(key, 0, head, memoryview(body), sealed[-_TAG_BYTES:])
        page = bytes(body[_TAGS_BYTES:]).ljust(INDEX_BYTES, b"\0")
        return Opened(page, key, head, bytes(body[:_TAGS_BYTES]))

    def _segment_key(self, where: str, head: bytes) -> bytes:
        about = parse_name(where.rpartition("/")[2])
        assert about is not None, where
        scope_key = _derived(self._key, b"scope " + about.scope.encode())
        return _derived(scope_key, b"segment " + where.encode(), salt=head[-_SALT_BYTES:])


class Opened(msgspec.Struct, frozen=True, gc=False):
    """A segment's index, as it is without encryption, and what opens its blocks."""

    page: bytes
    key: bytes
    head: bytes
    tags: bytes

    def block(self, position: int, block: memoryview) -> None:
        """Decrypt a block where it is. Raises BadSegment: then nothing may use what is there."""
        tag = self.tags[position * _TAG_BYTES : (position + 1) * _TAG_BYTES]
        _decrypt(self.key, position + 1, self.head, block, tag)


def is_sealed(page: bytes | bytearray | memoryview) -> bool:
    """Whether this stands in front of an encrypted segment."""
    return len(page) == INDEX_BYTES and bytes(page[: len(_MAGIC)]) == _MAGIC


def sealer_of(tier: Tier) -> Sealer | None:
    """What encrypts a tier. None: nothing does. Raises ValueError naming the setting."""
    if not tier.key_file:
        return None
    try:
        return Sealer(encryption_key(tier.key_file))
    except ValueError as error:
        raise ValueError(f"kv.tiers: key_file: {error}") from error


def _derived(key: bytes, info: bytes, *, salt: bytes | None = None) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt, b"baton kv " + info).derive(key)


def _encrypt(key: bytes, place: int, head: bytes, data: bytes | memoryview, into: memoryview) -> bytes:
    """The tag."""
    context = Cipher(algorithms.AES(key), modes.GCM(_nonce(place))).encryptor()
    context.authenticate_additional_data(head)
    context.update_into(data, into)
    context.finalize()
    return context.tag


def _decrypt(key: bytes, place: int, head: bytes, data: memoryview, tag: bytes) -> None:
    context = Cipher(algorithms.AES(key), modes.GCM(_nonce(place), tag)).decryptor()
    context.authenticate_additional_data(head)
    context.update_into(data, data)
    try:
        context.finalize()
    except InvalidTag:
        part = f"block {place - 1}" if place else "its index"
        raise BadSegment(f"{part} is not what was stored here with this key") from None


def _nonce(place: int) -> bytes:
    return place.to_bytes(_NONCE_BYTES, "big")
