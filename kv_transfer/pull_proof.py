"""Whether pulled KV may be used, as a pure machine: events in, actions out. Never reads a block and asks nobody itself.

That a read succeeded says nothing of what was read: the lease may have ended under it and the blocks have been given
to another request. So the taker proves every pull, one of two ways, before the request may be scheduled:

- by content: the holder tells the checksum that each block had when it was held, and the blocks here have the same;
- by word, for a pull that the holder does not check by content: asked after the read was over, the holder says that it
  holds the KV still, or held it until it heard that the read was over.

The holder is first asked while the read runs, so that a proof by content costs no round trip.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal

import msgspec

LeaseWord = Literal["held", "pulled", "ended", "unknown"]


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a holder says of one request's KV. Crosses the wire as msgpack."""

    engine_id: str
    """Incarnation that speaks: the port may be another engine's by now."""
    request_id: str
    """What it was asked about."""
    lease: LeaseWord
    """``held``: its blocks are kept. ``pulled``: they were, until its readers said that they were done. ``ended``: they
    were given up before that."""
    sums_kind: str = ""
    """How ``sums`` were computed (``block_sums.KIND``); empty: there are none, now or ever."""
    sums: bytes = b""
    """Eight bytes a block, in the order of the hand-off's blocks, of the rank that was asked about."""


class Verdict(enum.StrEnum):
    """How a pull ended. Only the first two may be used."""

    CHECKED = "checked"
    VOUCHED = "vouched"
    WRONG = "wrong"
    """The blocks are not what the holder held."""
    UNPROVED = "unproved"
    """The lease ended before the read did, or nobody could say."""


USABLE = frozenset({Verdict.CHECKED, Verdict.VOUCHED})


class ReadDone(msgspec.Struct, frozen=True):
    """Every block was read."""


class Answered(msgspec.Struct, frozen=True):
    """The holder's answer; None when it gave none in time."""

    answer: Answer | None


class Compared(msgspec.Struct, frozen=True):
    """The checksums were computed here and held against the holder's."""

    equal: bool


ProofEvent = ReadDone | Answered | Compared


class Ask(msgspec.Struct, frozen=True):
    """Ask the holder."""


class Compare(msgspec.Struct, frozen=True):
    """Compute the checksums of what was read and hold them against these."""

    sums: bytes


class Decide(msgspec.Struct, frozen=True):
    """It is over."""

    verdict: Verdict


ProofAction = Ask | Compare | Decide


class PullProof:
    """One pull. ``start`` first; then at most one question and one comparison are open at a time."""

    def __init__(self, engine_id: str, sums_kind: str) -> None:
        self._engine_id = engine_id
        # What this engine can compute; empty: nothing, so only the holder's word counts.
        self._sums_kind = sums_kind
        self._read_done = False
        self._asking_since_done = False
        self._open = False
        self._answer: Answer | None = None
        self.verdict: Verdict | None = None

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
            case Answered(answer=answer):
                assert self._open
                self._open = False
                self._answer = answer if answer is not None and answer.engine_id == self._engine_id else None
                return self._judge() if self._read_done else ()
            case Compared(equal=equal):
                assert self._read_done
                return self._decide(Verdict.CHECKED if equal else Verdict.WRONG)

    def _judge(self) -> Sequence[ProofAction]:
        answer = self._answer
        if answer is not None and answer.sums and answer.sums_kind == self._sums_kind:
            return (Compare(answer.sums),)
        if not self._asking_since_done:
            # A word that was given while the read ran says nothing of its end.
            return self._ask()
        vouched = answer is not None and answer.lease in ("held", "pulled")
        return self._decide(Verdict.VOUCHED if vouched else Verdict.UNPROVED)

    def _ask(self) -> Sequence[ProofAction]:
        assert not self._open
        self._open = True
        self._asking_since_done = self._read_done
        return (Ask(),)

    def _decide(self, verdict: Verdict) -> Sequence[ProofAction]:
        self.verdict = verdict
        return (Decide(verdict),)
