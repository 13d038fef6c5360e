"""The proof of a pull: only what was proved after the read was over may be used."""

from __future__ import annotations

from typing import Any

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


def said(*args: Any, **kwargs: Any) -> HolderReplied:
    return HolderReplied(reply(*args, **kwargs))


COMPARE, ASK, READ = CompareChecksums(SUMS), AskHolder(), ReadDone()
OTHER = "prefill-0-6"
# Events, and the action that each asks for.
SCRIPTS: dict[str, list[tuple[ProofEvent, ProofAction | None]]] = {
    "sums that came while the read ran cost no further question": [
        (said(checksums=SUMS), None),
        (READ, COMPARE),
        (ChecksumsCompared(True), Decide(TransferVerdict.CHECKED)),
    ],
    "sums that come after the read are compared then": [
        (READ, None),
        (said(checksums=SUMS), COMPARE),
        (ChecksumsCompared(False), Decide(TransferVerdict.WRONG)),
    ],
    "sums prove what was read even when the lease has ended since": [
        (READ, None),
        (said("ended", checksums=SUMS), COMPARE),
        (ChecksumsCompared(True), Decide(TransferVerdict.CHECKED)),
    ],
    "sums of another kind leave it to the holder's word": [
        (said(checksums=SUMS, kind="another"), None),
        (READ, ASK),
        (said("pulled", checksums=SUMS, kind="another"), Decide(TransferVerdict.ATTESTED)),
    ],
    # However the first answer and the end of the read crossed: that answer may be older than the end.
    "a word given during the read does not count": [
        (said("held"), None),
        (READ, ASK),
        (said("ended"), Decide(TransferVerdict.UNPROVED)),
    ],
    "a holder that does not answer": [
        (READ, None),
        (HolderReplied(None), ASK),
        (HolderReplied(None), Decide(TransferVerdict.UNPROVED)),
    ],
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_what_proves_a_pull(script: list[tuple[ProofEvent, ProofAction | None]]) -> None:
    pull = proof()
    for event, action in script:
        assert list(pull.handle(event)) == ([action] if action else [])
    with pytest.raises(AssertionError, match="after the verdict"):
        pull.handle(ChecksumsCompared(True))


ANSWERS = st.one_of(
    st.none(),
    st.builds(
        reply,
        lease=st.sampled_from(["held", "pulled", "ended", "unknown"]),
        checksums=st.sampled_from([b"", SUMS]),
        engine_id=st.sampled_from([ENGINE, OTHER]),
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
