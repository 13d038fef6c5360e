"""The proof of a pull: only what was proved after the read was over may be used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.integrity.transfer_proof import (
    USABLE,
    AskHolder,
    ChecksumsCompared,
    CompareChecksums,
    Decide,
    HolderReplied,
    HolderReply,
    LeaseWord,
    ProofAction,
    ProofEvent,
    ReadDone,
    TransferProof,
    TransferVerdict,
)

ENGINE = "prefill-0-5"
SUMS = b"12345678"


def reply(lease: LeaseWord = "held", checksums: bytes = b"", engine_id: str = ENGINE, kind: str = "k") -> HolderReply:
    return HolderReply(
        engine_id=engine_id, request_id="r", lease=lease, checksum_kind=kind if checksums else "", checksums=checksums
    )


def proof(kind: str = "k") -> TransferProof:
    made = TransferProof(ENGINE, kind)
    assert list(made.start()) == [AskHolder()]
    return made


def test_sums_that_came_while_the_read_ran_cost_no_further_question() -> None:
    pull = proof()
    assert list(pull.handle(HolderReplied(reply(checksums=SUMS)))) == []
    assert list(pull.handle(ReadDone())) == [CompareChecksums(SUMS)]
    assert list(pull.handle(ChecksumsCompared(True))) == [Decide(TransferVerdict.CHECKED)]


def test_sums_that_come_after_the_read_are_compared_then() -> None:
    pull = proof()
    assert list(pull.handle(ReadDone())) == []
    assert list(pull.handle(HolderReplied(reply(checksums=SUMS)))) == [CompareChecksums(SUMS)]
    assert list(pull.handle(ChecksumsCompared(False))) == [Decide(TransferVerdict.WRONG)]


@pytest.mark.parametrize(
    ("word", "verdict"),
    [
        (reply("held"), TransferVerdict.ATTESTED),
        (reply("pulled"), TransferVerdict.ATTESTED),
        (reply("ended"), TransferVerdict.UNPROVED),
        (reply("unknown"), TransferVerdict.UNPROVED),
        (reply("held", engine_id="prefill-0-6"), TransferVerdict.UNPROVED),
        (None, TransferVerdict.UNPROVED),
    ],
)
@pytest.mark.parametrize("read_first", [False, True])
def test_without_sums_only_a_word_asked_for_after_the_read_counts(
    word: HolderReply | None, verdict: TransferVerdict, read_first: bool
) -> None:
    pull = proof()
    early: list[ProofAction] = []
    for event in (
        (ReadDone(), HolderReplied(reply("held"))) if read_first else (HolderReplied(reply("held")), ReadDone())
    ):
        early += pull.handle(event)
    # However the first answer and the end of the read crossed: that answer may be older than the end.
    assert early == [AskHolder()]
    assert list(pull.handle(HolderReplied(word))) == [Decide(verdict)]


@pytest.mark.parametrize("kind", ["", "another"])
def test_sums_that_cannot_be_compared_here_leave_it_to_the_holders_word(kind: str) -> None:
    pull = proof(kind)
    pull.handle(HolderReplied(reply(checksums=SUMS)))
    assert list(pull.handle(ReadDone())) == [AskHolder()]
    assert list(pull.handle(HolderReplied(reply("pulled", checksums=SUMS)))) == [Decide(TransferVerdict.ATTESTED)]


def test_a_verdict_is_the_last_word() -> None:
    pull = proof()
    for event in (HolderReplied(reply(checksums=SUMS)), ReadDone(), ChecksumsCompared(False)):
        pull.handle(event)
    with pytest.raises(AssertionError, match="after the verdict wrong"):
        pull.handle(ChecksumsCompared(True))


def test_sums_of_another_incarnation_prove_nothing() -> None:
    pull = proof()
    pull.handle(HolderReplied(reply(checksums=SUMS, engine_id="prefill-0-6")))
    assert list(pull.handle(ReadDone())) == [AskHolder()]
    assert list(pull.handle(HolderReplied(reply(checksums=SUMS, engine_id="prefill-0-6")))) == [
        Decide(TransferVerdict.UNPROVED)
    ]


def test_sums_prove_what_was_read_even_when_the_lease_has_ended_since() -> None:
    pull = proof()
    pull.handle(ReadDone())
    assert list(pull.handle(HolderReplied(reply("ended", checksums=SUMS)))) == [CompareChecksums(SUMS)]


ANSWERS = st.one_of(
    st.none(),
    st.builds(
        reply,
        lease=st.sampled_from(["held", "pulled", "ended", "unknown"]),
        checksums=st.sampled_from([b"", SUMS]),
        engine_id=st.sampled_from([ENGINE, "prefill-0-6"]),
        kind=st.sampled_from(["k", "another"]),
    ),
)


@given(ANSWERS, ANSWERS, st.booleans(), st.booleans())
def test_whatever_comes_it_ends_after_the_read_with_at_most_two_questions_and_rightly(
    early: HolderReply | None, late: HolderReply | None, answered_before_the_read: bool, equal: bool
) -> None:
    pull = proof()
    actions: list[ProofAction] = []
    first: list[ProofEvent] = (
        [HolderReplied(early), ReadDone()] if answered_before_the_read else [ReadDone(), HolderReplied(early)]
    )
    for event in first:
        assert pull.verdict is None
        actions += pull.handle(event)
    last = early
    if actions == [AskHolder()]:
        last = late
        actions = list(pull.handle(HolderReplied(late)))
    compared = actions == [CompareChecksums(SUMS)]
    if compared:
        actions = list(pull.handle(ChecksumsCompared(equal)))
    assert pull.verdict is not None
    assert actions == [Decide(pull.verdict)]
    if pull.verdict in USABLE:
        assert last is not None
        assert last.engine_id == ENGINE
        assert equal if compared else (last is late and last.lease in ("held", "pulled"))
