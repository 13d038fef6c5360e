"""Load or compute: by what both took, in seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.tiers.cost import FadingLine, LoadJudge

TOKENS = st.integers(1, 100_000)


@given(st.floats(0, 1), st.floats(1e-6, 1e-2), st.lists(TOKENS, min_size=2, max_size=30, unique=True))
def test_a_line_is_found_again(start_s: float, each_s: float, seen: list[int]) -> None:
    line = FadingLine()
    for tokens in seen:
        line.note(tokens, start_s + each_s * tokens)
    for tokens in seen:
        assert line.at(tokens) == pytest.approx(start_s + each_s * tokens, rel=0.02, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 100_000), st.floats(0, 100)), max_size=30), TOKENS)
def test_nothing_takes_less_time_than_none_and_more_tokens_take_no_less(
    seen: list[tuple[int, float]], tokens: int
) -> None:
    line = FadingLine()
    for each in seen:
        line.note(*each)
    less, more = line.at(tokens), line.at(2 * tokens)
    if not any(tokens for tokens, _ in seen):
        assert less is more is line.per_token_s is None
    else:
        assert less is not None and more is not None
        assert 0 <= less <= more


def test_the_latest_count_most() -> None:
    line = FadingLine()
    for seconds in (1.0, 9.0):
        for _ in range(300):
            line.note(100, seconds)
    assert line.at(100) == pytest.approx(9.0, rel=0.01)


def judge(load_s: float, compute_s: float) -> LoadJudge:
    """Of a tier and an engine that take so long for a thousand tokens."""
    steps = FadingLine()
    made = LoadJudge(steps)
    for tokens in (500, 1000) * 4:
        made.loaded(tokens, load_s * tokens / 1000)
        steps.note(tokens, compute_s * tokens / 1000)
    return made


def test_it_loads_where_that_is_faster_and_computes_where_that_is() -> None:
    assert judge(0.1, 1.0).pays(800)
    assert not judge(1.0, 0.1).pays(800)


def test_a_load_that_takes_long_to_begin_pays_for_long_prompts_alone() -> None:
    made = judge(0.0, 1.0)
    for tokens in (500, 1000) * 300:
        made.loaded(tokens, 1.0)
    assert not made.pays(100)
    assert made.pays(2000)


def test_it_loads_while_it_knows_nothing() -> None:
    steps = FadingLine()
    made = LoadJudge(steps)
    for _ in range(7):
        assert made.pays(1) and made.worth_storing(1)
        made.loaded(100, 3.0)
        steps.note(100, 1.0)
    assert made.pays(1) and made.computing_s(1) is None
    made.loaded(100, 3.0)
    steps.note(100, 1.0)
    assert not made.pays(1)
    assert made.computing_s(200) == pytest.approx(2.0)


def test_a_tier_that_is_far_slower_is_known_after_three_loads() -> None:
    for times, pays in ((3.9, True), (4.1, False)):
        steps = FadingLine()
        made = LoadJudge(steps)
        for _ in range(8):
            steps.note(100, 1.0)
        for _ in range(3):
            assert made.pays(100)
            made.loaded(100, times)
        assert made.pays(100) == pays


def test_what_would_be_computed_all_the_same_is_seldom_stored() -> None:
    assert judge(0.1, 1.0).worth_storing(800)
    slow = judge(1.0, 0.1)
    assert sum(slow.worth_storing(1000) for _ in range(32)) == 2


def test_after_a_start_in_which_a_tier_hung_few_good_loads_are_enough() -> None:
    steps = FadingLine()
    made = LoadJudge(steps)
    for _ in range(8):
        steps.note(1000, 1.0)
    for _ in range(8):
        made.loaded(1000, 1000.0)
    assert not made.pays(1000)
    asked = 0
    while not made.would_pay(1000):
        asked += 1
        if made.pays(1000):
            made.loaded(1000, 0.1)
    assert asked < 30 * 16


def test_a_tier_that_was_slow_once_is_tried_again() -> None:
    made = judge(1.0, 0.1)
    answers = [made.pays(1000) for _ in range(32)]
    assert sum(answers) == 2
    for _ in range(600):
        made.loaded(1000, 0.001)
    assert made.pays(1000)
