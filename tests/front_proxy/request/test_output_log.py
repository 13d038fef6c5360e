"""Every token once and in order, whatever several attempts produce."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Finish, Logprobs
from front_proxy.request.output_log import OutputLog
from front_proxy.request.work import WorkerOutput


def output(tokens: list[int], *, finish: Finish | None = None, width: int = 0) -> WorkerOutput:
    table = None
    if width:
        table = Logprobs(
            width=width,
            token_ids=[token for token in tokens for _ in range(width)],
            logprobs=[-float(token) for token in tokens for _ in range(width)],
            ranks=list(tokens),
        )
    return WorkerOutput(token_ids=tokens, finish=finish, logprobs=table)


def test_a_replay_shows_only_what_is_new_with_its_own_logprobs() -> None:
    log = OutputLog(continuing=False)
    log.begin()
    log.fresh(output([1, 2, 3], width=2))
    log.begin()
    assert log.resume_token_ids == ()
    first = log.fresh(output([1, 2], width=2))
    assert first is not None and first.token_ids == [] and first.logprobs is None
    second = log.fresh(output([3, 4], width=2))
    assert second is not None and second.token_ids == [4]
    assert second.logprobs == Logprobs(width=2, token_ids=[4, 4], logprobs=[-4.0, -4.0], ranks=[4])
    assert log.tokens == [1, 2, 3, 4]


def test_it_is_known_how_far_the_best_replay_got_since_the_last_new_token() -> None:
    log = OutputLog(continuing=False)
    log.begin()
    log.fresh(output([1, 2, 3]))
    seen = []
    for replayed in ([1], [1, 2], [1], [1, 2, 3, 4], [1, 2]):
        log.begin()
        log.fresh(output(replayed))
        seen.append(log.furthest)
    assert seen == [1, 2, 2, 3, 2], "a new token begins the count anew"


def test_a_replay_that_differs_is_refused_and_shows_nothing() -> None:
    log = OutputLog(continuing=False)
    log.begin()
    log.fresh(output([1, 2, 3]))
    log.begin()
    assert log.fresh(output([1, 9])) is None
    assert log.tokens == [1, 2, 3]


def test_a_replay_that_ends_early_is_refused() -> None:
    log = OutputLog(continuing=False)
    log.begin()
    log.fresh(output([1, 2, 3]))
    log.begin()
    assert log.fresh(output([1, 2], finish=Finish("stop"))) is None


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 4), max_size=30)), max_size=6),
    st.booleans(),
)
def test_however_attempts_break_off_each_token_comes_once(
    answer: list[int], attempts: list[tuple[int, list[int]]], continuing: bool
) -> None:
    log, seen = OutputLog(continuing=continuing), []
    for breaks_at, steps in [*attempts, (len(answer), [1] * 2 * len(answer))]:
        log.begin()
        position = len(log.resume_token_ids)
        for count in steps:
            if position >= min(breaks_at, len(answer)):
                break
            piece = answer[position : position + count]
            position += len(piece)
            fresh = log.fresh(output(piece, width=1))
            assert fresh is not None
            seen += fresh.token_ids
            if fresh.token_ids:
                assert fresh.logprobs is not None and fresh.logprobs.token_ids == fresh.token_ids
    assert seen == answer == log.tokens
