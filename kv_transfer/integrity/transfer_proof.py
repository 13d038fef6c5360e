"""Decides whether pulled KV may be used. Pure: events in, actions out. Reads no block and sends nothing itself.

A finished read does not say what was read. The lease may have ended during the read, and another request may own the
blocks since. So the decode engine (the *taker*) proves every pull before the request may be scheduled. The prefill
engine is the *holder*. There are two ways:

- by content: the holder tells the checksum of each block at the time it was held, and the blocks here have the same;
- by attestation, where the holder computed no checksums: asked after the read ended, the holder says that it still
  holds the KV, or that it held the KV until it heard that the read was over.

The taker asks the holder while the read still runs. So a proof by content costs no round trip.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal

import msgspec

LeaseWord = Literal["held", "pulled", "ended", "unknown"]


class HolderReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A holder's statement about one request's KV. Crosses the wire as msgpack."""

    engine_id: str
    """The engine that replies. The port may belong to another engine by now."""
    request_id: str
    """The request that it was asked about."""
    lease: LeaseWord
    """``held``: the blocks are kept. ``pulled``: they were kept until every reader reported the end of its read.
    ``ended``: they were given up before that."""
    checksum_kind: str = ""
    """How ``checksums`` were computed (``block_checksums.KIND``). Empty: the holder computes no checksums."""
    checksums: bytes = b""
    """Eight bytes a block, in the order of the hand-off's blocks, of the rank that was asked about."""


class TransferVerdict(enum.StrEnum):
    """How a pull ended. Only the first two may be used."""

    CHECKED = "checked"
    ATTESTED = "attested"
    WRONG = "wrong"
    """The blocks are not what the holder held."""
    UNPROVED = "unproved"
    """The lease ended before the read did, or no holder replied."""


USABLE = frozenset({TransferVerdict.CHECKED, TransferVerdict.ATTESTED})


class ReadDone(msgspec.Struct, frozen=True):
    """Every block was read."""


class HolderReplied(msgspec.Struct, frozen=True):
    """The holder's reply; None when none came in time."""

    reply: HolderReply | None


class ChecksumsCompared(msgspec.Struct, frozen=True):
    """The checksums of the blocks here were compared with the holder's."""

    equal: bool


ProofEvent = ReadDone | HolderReplied | ChecksumsCompared


class AskHolder(msgspec.Struct, frozen=True):
    """Ask the holder about the request."""


class CompareChecksums(msgspec.Struct, frozen=True):
    """Compute the checksums of the blocks that were read and compare them with these."""

    checksums: bytes


class Decide(msgspec.Struct, frozen=True):
    """The proof is over."""

    verdict: TransferVerdict


ProofAction = AskHolder | CompareChecksums | Decide


class TransferProof:
    """One pull. Call ``start`` first. At most one question and one comparison are open at a time."""

    def __init__(self, engine_id: str, checksum_kind: str) -> None:
        self._engine_id = engine_id
        # What this engine can compute. Empty: nothing, so only an attestation counts.
        self._checksum_kind = checksum_kind
        self._read_done = False
        self._asked_since_done = False
        self._open = False
        self._reply: HolderReply | None = None
        self.verdict: TransferVerdict | None = None

    def start(self) -> Sequence[ProofAction]:
        """The first question, while the read runs."""
        return self._ask()

    def handle(self, event: ProofEvent) -> Sequence[ProofAction]:
        """What to do next."""
        assert self.verdict is None, f"{event} after the verdict {self.verdict}"
        match event:
            case ReadDone():
                assert not self._read_done
                self._read_done = True
                return () if self._open else self._judge()
            case HolderReplied(reply=reply):
                assert self._open
                self._open = False
                self._reply = reply if reply is not None and reply.engine_id == self._engine_id else None
                return self._judge() if self._read_done else ()
            case ChecksumsCompared(equal=equal):
                assert self._read_done
                return self._decide(TransferVerdict.CHECKED if equal else TransferVerdict.WRONG)

    def _judge(self) -> Sequence[ProofAction]:
        reply = self._reply
        if reply is not None and reply.checksums and reply.checksum_kind == self._checksum_kind:
            return (CompareChecksums(reply.checksums),)
        if not self._asked_since_done:
            # A reply that was given during the read says nothing about the end of the read.
            return self._ask()
        attested = reply is not None and reply.lease in ("held", "pulled")
        return self._decide(TransferVerdict.ATTESTED if attested else TransferVerdict.UNPROVED)

    def _ask(self) -> Sequence[ProofAction]:
        assert not self._open
        self._open = True
        self._asked_since_done = self._read_done
        return (AskHolder(),)

    def _decide(self, verdict: TransferVerdict) -> Sequence[ProofAction]:
        self.verdict = verdict
        return (Decide(verdict),)
