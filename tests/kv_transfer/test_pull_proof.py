"""The proof of a pull: only what was proved after the read was over may be used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.pull_proof import (
    USABLE,
    Answer,
    Answered,
    Ask,
    Compare,
    Compared,
    Decide,
    LeaseWord,
    ProofAction,
    ProofEvent,
    PullProof,
    ReadDone,
    Verdict,
)

ENGINE = "prefill-0-5"
SUMS = b"12345678"


def answer(lease: LeaseWord = "held", sums: bytes = b"", engine_id: str = ENGINE, kind: str = "k") -> Answer:
    return Answer(engine_id=engine_id, request_id="r", lease=lease, sums_kind=kind if sums else "", sums=sums)


def proof(kind: str = "k") -> PullProof:
    made = PullProof(ENGINE, kind)
    assert list(made.start()) == [Ask()]
    return made


def test_sums_that_came_while_the_read_ran_cost_no_further_question() -> None:
    pull = proof()
    assert list(pull.handle(Answered(answer(sums=SUMS)))) == []
    assert list(pull.handle(ReadDone())) == [Compare(SUMS)]
    assert list(pull.handle(Compared(True))) == [Decide(Verdict.CHECKED)]


def test_sums_that_come_after_the_read_are_compared_then() -> None:
    pull = proof()
    assert list(pull.handle(ReadDone())) == []
    assert list(pull.handle(Answered(answer(sums=SUMS)))) == [Compare(SUMS)]
    assert list(pull.handle(Compared(False))) == [Decide(Verdict.WRONG)]


@pytest.mark.parametrize(
    ("word", "verdict"),
    [
        (answer("held"), Verdict.VOUCHED),
        (answer("pulled"), Verdict.VOUCHED),
        (answer("ended"), Verdict.UNPROVED),
        (answer("unknown"), Verdict.UNPROVED),
        (answer("held", engine_id="prefill-0-6"), Verdict.UNPROVED),
        (None, Verdict.UNPROVED),
    ],
)
@pytest.mark.parametrize("read_first", [False, True])
def test_without_sums_only_a_word_asked_for_after_the_read_counts(
    word: Answer | None, verdict: Verdict, read_first: bool
) -> None:
    pull = proof()
    early: list[ProofAction] = []
    for event in (ReadDone(), Answered(answer("held"))) if read_first else (Answered(answer("held")), ReadDone()):
        early += pull.handle(event)
    # However the first answer and the end of the read crossed: that answer may be older than the end.
    assert early == [Ask()]
    assert list(pull.handle(Answered(word))) == [Decide(verdict)]


@pytest.mark.parametrize("kind", ["", "another"])
def test_sums_that_cannot_be_compared_here_leave_it_to_the_holders_word(kind: str) -> None:
    pull = proof(kind)
    pull.handle(Answered(answer(sums=SUMS)))
    assert list(pull.handle(ReadDone())) == [Ask()]
    assert list(pull.handle(Answered(answer("pulled", sums=SUMS)))) == [Decide(Verdict.VOUCHED)]


def test_where_nobody_has_sums_there_are_none_to_be_equal() -> None:
    pull = proof("")
    pull.handle(Answered(answer("held")))
    assert list(pull.handle(ReadDone())) == [Ask()]
    assert list(pull.handle(Answered(answer("ended")))) == [Decide(Verdict.UNPROVED)]


def test_a_verdict_is_the_last_word() -> None:
    pull = proof()
    for event in (Answered(answer(sums=SUMS)), ReadDone(), Compared(False)):
        pull.handle(event)
    with pytest.raises(AssertionError, match="after the verdict wrong"):
        pull.handle(Compared(True))


def test_sums_of_another_incarnation_prove_nothing() -> None:
    pull = proof()
    pull.handle(Answered(answer(sums=SUMS, engine_id="prefill-0-6")))
    assert list(pull.handle(ReadDone())) == [Ask()]
    assert list(pull.handle(Answered(answer(sums=SUMS, engine_id="prefill-0-6")))) == [Decide(Verdict.UNPROVED)]


def test_sums_prove_what_was_read_even_when_the_lease_has_ended_since() -> None:
    pull = proof()
    pull.handle(ReadDone())
    assert list(pull.handle(Answered(answer("ended", sums=SUMS)))) == [Compare(SUMS)]


ANSWERS = st.one_of(
    st.none(),
    st.builds(
        answer,
        lease=st.sampled_from(["held", "pulled", "ended", "unknown"]),
        sums=st.sampled_from([b"", SUMS]),
        engine_id=st.sampled_from([ENGINE, "prefill-0-6"]),
        kind=st.sampled_from(["k", "another"]),
    ),
)


@given(ANSWERS, ANSWERS, st.booleans(), st.booleans())
def test_whatever_comes_it_ends_after_the_read_with_at_most_two_questions_and_rightly(
    early: Answer | None, late: Answer | None, answered_before_the_read: bool, equal: bool
) -> None:
    pull = proof()
    actions: list[ProofAction] = []
    first: list[ProofEvent] = (
        [Answered(early), ReadDone()] if answered_before_the_read else [ReadDone(), Answered(early)]
    )
    for event in first:
        assert pull.verdict is None
        actions += pull.handle(event)
    last = early
    if actions == [Ask()]:
        last = late
        actions = list(pull.handle(Answered(late)))
    compared = actions == [Compare(SUMS)]
    if compared:
        actions = list(pull.handle(Compared(equal)))
    assert pull.verdict is not None
    assert actions == [Decide(pull.verdict)]
    if pull.verdict in USABLE:
        assert last is not None
        assert last.engine_id == ENGINE
        assert equal if compared else (last is late and last.lease in ("held", "pulled"))
