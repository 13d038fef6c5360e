"""What a holder knows of the KV it holds and held, and says when it is asked. Never frees anything.

Written by the engine's scheduler, read by the thread that answers the side channel.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import msgspec

from kv_transfer.pull_proof import Answer, LeaseWord

_ENDED_MAX = 4096
_ENDED_SUMS_BYTES_MAX = 32 << 20
_QUESTION = "baton_proof:"


class _Entry:
    __slots__ = ("lease", "sums")

    def __init__(self) -> None:
        self.lease: LeaseWord = "held"
        # By rank.
        self.sums: dict[int, bytes] = {}

    @property
    def sums_bytes(self) -> int:
        return sum(map(len, self.sums.values()))


class HolderBook:
    """One engine's book, by vLLM's request id. What ended is remembered for a while, since its taker may still ask."""

    def __init__(self, engine_id: str, sums_kind: str) -> None:
        """``sums_kind``: how the sums that it will be told are computed."""
        self._engine_id = engine_id
        self._sums_kind = sums_kind
        self._lock = threading.Lock()
        self._held: dict[str, _Entry] = {}
        self._ended: OrderedDict[str, _Entry] = OrderedDict()
        self._ended_sums_bytes = 0

    def hold(self, request_id: str) -> None:
        """Its blocks are kept from now on."""
        with self._lock:
            self._held[request_id] = _Entry()

    def learn(self, request_id: str, rank: int, sums: bytes) -> None:
        """The sums its blocks had on one rank when they were held."""
        with self._lock:
            if (entry := self._held.get(request_id)) is not None:
                entry.sums[rank] = sums

    def end(self, request_id: str, *, pulled: bool) -> None:
        """Its blocks are about to be freed, ``pulled`` because every reader said that it is done."""
        with self._lock:
            entry = self._held.pop(request_id, None)
            if entry is None:
                return
            entry.lease = "pulled" if pulled else "ended"
            self._ended[request_id] = entry
            self._ended_sums_bytes += entry.sums_bytes
            while len(self._ended) > _ENDED_MAX or self._ended_sums_bytes > _ENDED_SUMS_BYTES_MAX:
                _, forgotten = self._ended.popitem(last=False)
                self._ended_sums_bytes -= forgotten.sums_bytes

    def answer(self, request_id: str, rank: int) -> Answer:
        """What is known now."""
        with self._lock:
            entry = self._held.get(request_id) or self._ended.get(request_id)
            if entry is None:
                return Answer(engine_id=self._engine_id, request_id=request_id, lease="unknown")
            sums = entry.sums.get(rank, b"")
            kind = self._sums_kind if sums else ""
            return Answer(
                engine_id=self._engine_id, request_id=request_id, lease=entry.lease, sums_kind=kind, sums=sums
            )


class Answers(dict[Any, bytes]):
    """vLLM's handshake listener looks its answers up in a dict; this one answers our question too.

    A question is the key (``baton_proof:`` + request id, rank), which no rank of vLLM's can be.
    """

    def __init__(self, handshakes: dict[tuple[int, int], bytes], book: HolderBook) -> None:
        super().__init__(handshakes)
        self._book = book

    def __missing__(self, key: tuple[Any, Any]) -> bytes:
        about, rank = key
        if not isinstance(about, str) or not about.startswith(_QUESTION) or not isinstance(rank, int):
            # Nothing that a stranger sends may end the listener's thread.
            return b""
        return msgspec.msgpack.encode(self._book.answer(about.removeprefix(_QUESTION), rank))


def question(message: bytes, request_id: str, rank: int) -> bytes:
    """The side channel's message that asks about a request. ``message``: vLLM's own first field."""
    return msgspec.msgpack.encode((message, f"{_QUESTION}{request_id}", rank))


def is_checked(lease_id: str, fraction: float) -> bool:
    """Whether this lease is one of the ``fraction`` that is checked by content; the same for the same lease always."""
    draw = int.from_bytes(hashlib.blake2b(lease_id.encode(), digest_size=8).digest(), "little")
    return draw < fraction * 2**64
