"""What a holder knows about KV that it holds or held, and its replies to takers. Never frees anything.

The engine's scheduler writes it. The thread that answers the side channel reads it.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import msgspec

from kv_transfer.integrity.transfer_proof import HolderReply, LeaseWord

_ENDED_MAX = 4096
_ENDED_CHECKSUM_BYTES_MAX = 32 << 20
_QUESTION = "baton_proof:"


class _Entry:
    __slots__ = ("checksums", "lease")

    def __init__(self) -> None:
        self.lease: LeaseWord = "held"
        # By rank.
        self.checksums: dict[int, bytes] = {}

    @property
    def checksum_bytes(self) -> int:
        return sum(map(len, self.checksums.values()))


class HeldKvRegistry:
    """One engine's held KV by vLLM's request id. Ended entries are kept for a while: the taker may still ask."""

    def __init__(self, engine_id: str, checksum_kind: str) -> None:
        """``checksum_kind``: how the checksums passed to ``learn`` are computed."""
        self._engine_id = engine_id
        self._checksum_kind = checksum_kind
        self._lock = threading.Lock()
        self._held: dict[str, _Entry] = {}
        self._ended: OrderedDict[str, _Entry] = OrderedDict()
        self._ended_checksum_bytes = 0

    def hold(self, request_id: str) -> None:
        """The request's blocks are kept from now on."""
        with self._lock:
            self._held[request_id] = _Entry()

    def learn(self, request_id: str, rank: int, checksums: bytes) -> None:
        """The checksums that the blocks had on one rank when the hold began."""
        with self._lock:
            if (entry := self._held.get(request_id)) is not None:
                entry.checksums[rank] = checksums

    def end(self, request_id: str, *, pulled: bool) -> None:
        """The blocks are about to be freed. ``pulled``: every reader reported that it is done."""
        with self._lock:
            entry = self._held.pop(request_id, None)
            if entry is None:
                return
            entry.lease = "pulled" if pulled else "ended"
            self._ended[request_id] = entry
            self._ended_checksum_bytes += entry.checksum_bytes
            while len(self._ended) > _ENDED_MAX or self._ended_checksum_bytes > _ENDED_CHECKSUM_BYTES_MAX:
                _, forgotten = self._ended.popitem(last=False)
                self._ended_checksum_bytes -= forgotten.checksum_bytes

    def reply(self, request_id: str, rank: int) -> HolderReply:
        """What is known now."""
        with self._lock:
            entry = self._held.get(request_id) or self._ended.get(request_id)
            if entry is None:
                return HolderReply(engine_id=self._engine_id, request_id=request_id, lease="unknown")
            checksums = entry.checksums.get(rank, b"")
            return HolderReply(
                engine_id=self._engine_id,
                request_id=request_id,
                lease=entry.lease,
                checksum_kind=self._checksum_kind if checksums else "",
                checksums=checksums,
            )


class HandshakeResponder(dict[Any, bytes]):
    """Replies to vLLM's handshakes and to our questions on one port.

    vLLM's handshake listener looks up each reply in a dict. This dict also holds replies to our questions. The key of a
    question is (``baton_proof:`` + request id, rank), which no rank of vLLM's can be.
    """

    def __init__(self, handshakes: dict[tuple[int, int], bytes], registry: HeldKvRegistry) -> None:
        super().__init__(handshakes)
        self._registry = registry

    def __missing__(self, key: tuple[Any, Any]) -> bytes:
        about, rank = key
        if not isinstance(about, str) or not about.startswith(_QUESTION) or not isinstance(rank, int):
            # A message from a stranger must not end the listener's thread.
            return b""
        return msgspec.msgpack.encode(self._registry.reply(about.removeprefix(_QUESTION), rank))


def question(message: bytes, request_id: str, rank: int) -> bytes:
    """The side-channel message that asks about a request. ``message``: vLLM's own first field."""
    return msgspec.msgpack.encode((message, f"{_QUESTION}{request_id}", rank))


def is_checked(lease_id: str, fraction: float) -> bool:
    """Whether this lease is in the ``fraction`` that is checked by content. One lease always gives one result."""
    draw = int.from_bytes(hashlib.blake2b(lease_id.encode(), digest_size=8).digest(), "little")
    return draw < fraction * 2**64
