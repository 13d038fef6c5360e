"""Carries out the proofs of an engine's pulls: asks holders over their side channel, has checksums computed.

Nothing here waits, and nothing runs on a thread of its own: an engine's thread leaves another one little of Python's
lock (measured: 2 ms a pull with threads, against 0.1 ms).
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, assert_never

import msgspec
import zmq

from kv_transfer.pull_proof import (
    Answer,
    Answered,
    Ask,
    Compare,
    Compared,
    Decide,
    ProofAction,
    PullProof,
    ReadDone,
    Verdict,
)

_LINES_MAX = 256


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask, and about what."""

    host: str
    port: int
    engine_id: str
    request_id: str
    rank: int


class Sums(Protocol):
    """Checksums that a device may still be computing."""

    def ready(self) -> bytes | None:
        """The sums, or None while they are not there. Never waits."""
        ...


class Lines(Protocol):
    """How holders are asked."""

    def ask(self, holder: Holder) -> None:
        """Send one question."""
        ...

    def answers(self) -> Iterator[tuple[str, int, Answer]]:
        """Host, port and answer of whatever has come. Never waits."""
        ...

    def give_up(self, holder: Holder) -> None:
        """It did not answer: what is still to come from there is for nobody."""
        ...

    def close(self) -> None:
        """Ask nothing more."""
        ...


class _Pull:
    __slots__ = ("asked_s", "block_ids", "holder", "proof", "sums", "wanted")

    def __init__(self, holder: Holder, block_ids: Sequence[int], proof: PullProof) -> None:
        self.holder = holder
        self.block_ids = block_ids
        self.proof = proof
        # Since when a question is open.
        self.asked_s: float | None = None
        # Ours, and the holder's that they are held against.
        self.sums: Sums | None = None
        self.wanted = b""


class PullProver:
    """Every pull of one engine that is not proved yet. All methods are called from the engine's thread."""

    def __init__(
        self,
        *,
        lines: Lines,
        timeout_s: float,
        sums_of: Callable[[Sequence[int]], Sums] | None = None,
        sums_kind: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``sums_of`` None: this engine cannot compute sums, and only the holders' words count."""
        self._lines = lines
        self._timeout_s = timeout_s
        self._sums_of = sums_of
        self._sums_kind = sums_kind if sums_of is not None else ""
        self._clock = clock
        self._pulls: dict[str, _Pull] = {}

    def __len__(self) -> int:
        return len(self._pulls)

    def begin(self, request_id: str, holder: Holder, block_ids: Sequence[int]) -> None:
        """A read begins: ``block_ids`` are those it fills here, the last ones of the hand-off."""
        pull = _Pull(holder, block_ids, PullProof(holder.engine_id, self._sums_kind))
        self._pulls[request_id] = pull
        self._perform(pull, pull.proof.start())

    def read_done(self, request_id: str) -> None:
        """Its last byte is here."""
        pull = self._pulls[request_id]
        self._perform(pull, pull.proof.handle(ReadDone()))

    def drop(self, request_id: str) -> None:
        """The read failed, so there is nothing to prove. Idempotent."""
        self._pulls.pop(request_id, None)

    def verdicts(self) -> dict[str, tuple[Verdict, Sequence[int]]]:
        """The proofs that ended since the last call, and the blocks they are about, by request. Never waits."""
        if not self._pulls:
            return {}
        told = {(host, port, answer.request_id): answer for host, port, answer in self._lines.answers()}
        now_s = self._clock()
        done: dict[str, tuple[Verdict, Sequence[int]]] = {}
        for request_id, pull in self._pulls.items():
            self._hear(pull, told, now_s)
            if pull.sums is not None and (ours := pull.sums.ready()) is not None:
                pull.sums = None
                # A prefix that is cached here was not read: what was read is the end.
                self._perform(pull, pull.proof.handle(Compared(pull.wanted.endswith(ours))))
            if pull.proof.verdict is not None:
                done[request_id] = pull.proof.verdict, pull.block_ids
        for request_id in done:
            del self._pulls[request_id]
        return done

    def close(self) -> None:
        """Ask and prove nothing more."""
        self._pulls.clear()
        self._lines.close()

    def _hear(self, pull: _Pull, told: dict[tuple[str, int, str], Answer], now_s: float) -> None:
        if pull.asked_s is None:
            return
        holder = pull.holder
        answer = told.get((holder.host, holder.port, holder.request_id))
        if answer is None and now_s - pull.asked_s < self._timeout_s:
            return
        if answer is None:
            self._lines.give_up(holder)
        pull.asked_s = None
        self._perform(pull, pull.proof.handle(Answered(answer)))

    def _perform(self, pull: _Pull, actions: Sequence[ProofAction]) -> None:
        for action in actions:
            match action:
                case Ask():
                    pull.asked_s = self._clock()
                    self._lines.ask(pull.holder)
                case Compare(sums=sums):
                    assert self._sums_of is not None
                    pull.wanted = sums
                    pull.sums = self._sums_of(pull.block_ids)
                case Decide():
                    pass
                case _:
                    assert_never(action)


class SideChannelLines:
    """Questions over the side channel on which engines ask for each other's NIXL metadata; one socket a holder."""

    def __init__(self, question: Callable[[str, int], bytes]) -> None:
        """``question``: the message that asks about a request id and a rank."""
        self._question = question
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: OrderedDict[tuple[str, int], zmq.Socket[bytes]] = OrderedDict()

    def ask(self, holder: Holder) -> None:
        """Send one question. One that cannot be sent is one that is not answered."""
        socket = self._socket(holder.host, holder.port)
        with contextlib.suppress(zmq.ZMQError):
            socket.send_multipart((b"", self._question(holder.request_id, holder.rank)), zmq.DONTWAIT)

    def answers(self) -> Iterator[tuple[str, int, Answer]]:
        """Host, port and answer of whatever has come; what makes no sense is no answer."""
        for (host, port), socket in self._sockets.items():
            with contextlib.suppress(zmq.Again):
                while True:
                    parts = socket.recv_multipart(zmq.DONTWAIT)
                    with contextlib.suppress(msgspec.DecodeError, IndexError):
                        yield host, port, msgspec.msgpack.decode(parts[1], type=Answer)

    def give_up(self, holder: Holder) -> None:
        """The next question goes over a new connection."""
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
        if len(self._sockets) > _LINES_MAX:
            _, oldest = self._sockets.popitem(last=False)
            oldest.close(linger=0)
        return socket
