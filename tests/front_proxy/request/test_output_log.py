"""Every token once and in order, whatever several attempts produce."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize("replayed", [([1, 9], None), ([1, 2], Finish("stop"))], ids=["it differs", "it ends early"])
def test_a_replay_that_contradicts_what_was_shown_is_refused(replayed: tuple[list[int], Finish | None]) -> None:
    log = OutputLog(continuing=False)
    log.begin()
    log.fresh(output([1, 2, 3]))
    log.begin()
    tokens, finish = replayed
    assert log.fresh(output(tokens, finish=finish)) is None and log.tokens == [1, 2, 3]


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
