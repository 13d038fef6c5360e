"""Carries out the proofs of an engine's pulls: asks holders over their side channel and has checksums computed.

Nothing here waits, and nothing runs on its own thread. The engine's thread leaves other threads little of Python's lock
(measured: 2 ms a pull with threads, 0.1 ms without).
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, assert_never

import msgspec
import zmq

from kv_transfer.integrity.transfer_proof import (
    AskHolder,
    ChecksumsCompared,
    CompareChecksums,
    Decide,
    HolderReplied,
    HolderReply,
    ProofAction,
    ReadDone,
    TransferProof,
    TransferVerdict,
)

if TYPE_CHECKING:
    from kv_transfer.integrity.block_checksums import PendingChecksums

_SOCKETS_MAX = 256


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The engine to ask, and the request to ask about."""

    host: str
    port: int
    engine_id: str
    request_id: str
    rank: int


class _Pull:
    __slots__ = ("asked_s", "block_ids", "checksums", "holder", "proof", "wanted")

    def __init__(self, holder: Holder, block_ids: Sequence[int], proof: TransferProof) -> None:
        self.holder = holder
        self.block_ids = block_ids
        self.proof = proof
        # Since when a question is open.
        self.asked_s: float | None = None
        # Ours, and the holder's to compare them with.
        self.checksums: PendingChecksums | None = None
        self.wanted = b""


class TransferVerifier:
    """Every pull of one engine that is not proved yet. All methods are called from the engine's thread."""

    def __init__(
        self,
        *,
        channel: SideChannel,
        timeout_s: float,
        checksums_of: Callable[[Sequence[int]], PendingChecksums],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._checksums_of = checksums_of
        self.checksum_kind = ""
        """What ``checksums_of`` computes. Empty: it cannot be asked, and only attestations count."""
        self._clock = clock
        self._pulls: dict[str, _Pull] = {}

    def begin(self, request_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        """A read begins. It fills ``block_ids`` here with the last blocks of the hand-off."""
        pull = _Pull(holder, block_ids, TransferProof(holder.engine_id, self.checksum_kind))
        self._pulls[request_id] = pull
        self._perform(pull, pull.proof.start())

    def read_done(self, request_id: str) -> None:
        """The last byte has arrived."""
        pull = self._pulls[request_id]
        self._perform(pull, pull.proof.handle(ReadDone()))

    def drop(self, request_id: str) -> None:
        """The read failed, so there is nothing to prove. Idempotent."""
        self._pulls.pop(request_id, None)

    def verdicts(self) -> dict[str, tuple[TransferVerdict, Sequence[int]]]:
        """The proofs that ended since the last call, with the blocks they are about, by request. Never waits."""
        if not self._pulls:
            return {}
        replies = {(host, port, reply.request_id): reply for host, port, reply in self._channel.replies()}
        now_s = self._clock()
        done: dict[str, tuple[TransferVerdict, Sequence[int]]] = {}
        for request_id, pull in self._pulls.items():
            self._receive(pull, replies, now_s)
            if pull.checksums is not None and (ours := pull.checksums.ready()) is not None:
                pull.checksums = None
                # Blocks cached here were not read, so ours are the checksums of the end of the holder's list.
                self._perform(pull, pull.proof.handle(ChecksumsCompared(pull.wanted.endswith(ours))))
            if pull.proof.verdict is not None:
                done[request_id] = pull.proof.verdict, pull.block_ids
        for request_id in done:
            del self._pulls[request_id]
        return done

    def close(self) -> None:
        """Ask and prove nothing more."""
        self._pulls.clear()
        self._channel.close()

    def _receive(self, pull: _Pull, replies: dict[tuple[str, int, str], HolderReply], now_s: float) -> None:
        if pull.asked_s is None:
            return
        holder = pull.holder
        reply = replies.get((holder.host, holder.port, holder.request_id))
        if reply is None and now_s - pull.asked_s < self._timeout_s:
            return
        if reply is None:
            self._channel.give_up(holder)
        pull.asked_s = None
        self._perform(pull, pull.proof.handle(HolderReplied(reply)))

    def _perform(self, pull: _Pull, actions: Sequence[ProofAction]) -> None:
        for action in actions:
            match action:
                case AskHolder():
                    pull.asked_s = self._clock()
                    self._channel.ask(pull.holder)
                case CompareChecksums(checksums=checksums):
                    pull.wanted = checksums
                    pull.checksums = self._checksums_of(pull.block_ids)
                case Decide():
                    pass
                case _:
                    assert_never(action)


class SideChannel:
    """Questions over the side channel on which engines ask for each other's NIXL metadata. One socket a holder."""

    def __init__(self, question: Callable[[str, int], bytes]) -> None:
        """``question``: the message that asks about a request id and a rank."""
        self._question = question
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: OrderedDict[tuple[str, int], zmq.Socket[bytes]] = OrderedDict()

    def ask(self, holder: Holder) -> None:
        """Send one question. A question that cannot be sent counts as unanswered."""
        socket = self._socket(holder.host, holder.port)
        with contextlib.suppress(zmq.ZMQError):
            socket.send_multipart((b"", self._question(holder.request_id, holder.rank)), zmq.DONTWAIT)

    def replies(self) -> Iterator[tuple[str, int, HolderReply]]:
        """Host, port and reply of everything that has arrived. An unreadable message is ignored."""
        for (host, port), socket in self._sockets.items():
            with contextlib.suppress(zmq.Again):
                while True:
                    parts = socket.recv_multipart(zmq.DONTWAIT)
                    with contextlib.suppress(msgspec.DecodeError, IndexError):
                        yield host, port, msgspec.msgpack.decode(parts[1], type=HolderReply)

    def give_up(self, holder: Holder) -> None:
        """The holder did not reply. The next question goes over a new connection."""
        socket = self._sockets.pop((holder.host, holder.port), None)
        if socket is not None:
            socket.close(linger=0)

    def close(self) -> None:
        """End every connection."""
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()
        self._context.term()

    def _socket(self, host: str, port: int) -> zmq.Socket[bytes]:
        key = host, port
        if (socket := self._sockets.get(key)) is None:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, 1)
            socket.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
            self._sockets[key] = socket
        self._sockets.move_to_end(key)
        if len(self._sockets) > _SOCKETS_MAX:
            _, oldest = self._sockets.popitem(last=False)
            oldest.close(linger=0)
        return socket
