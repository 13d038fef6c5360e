"""The proof of a pull: only what was proved after the read was over may be used."""

from __future__ import annotations

from typing import Any

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
)
from tests.support.golden import GOLDEN, Options, check_script

ENGINE, OTHER = "prefill-0-5", "prefill-0-6"
SUMS = b"12345678"


def reply(lease: LeaseWord = "held", checksums: bytes = b"", engine_id: str = ENGINE, kind: str = "k") -> HolderReply:
    return HolderReply(
        engine_id=engine_id, request_id="r", lease=lease, checksum_kind=kind if checksums else "", checksums=checksums
    )


def proof(kind: str = "k") -> TransferProof:
    made = TransferProof(ENGINE, kind)
    assert list(made.start()) == [AskHolder()]
    return made


def test_a_pull_is_proved_as_written() -> None:
    pull = proof()

    def step(verb: str, names: list[str], options: Options) -> list[str]:
        nonlocal pull
        match verb:
            case "pull":
                pull = proof()
                return []
            case "read":
                actions = pull.handle(ReadDone())
            case "compared":
                actions = pull.handle(ChecksumsCompared(bool(options["equal"])))
            case "silence":
                actions = pull.handle(HolderReplied(None))
            case _:
                word: Any = names[0]
                kind, engine_id = options.get("sums", ""), options.get("engine", ENGINE)
                actions = pull.handle(HolderReplied(reply(word, SUMS if kind else b"", engine_id, kind)))
        return [getattr(action, "verdict", type(action).__name__) for action in actions]

    check_script(GOLDEN / "pull_proofs.txt", step)


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
