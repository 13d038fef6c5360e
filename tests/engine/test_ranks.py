"""Ranks: the least queued tokens, the holder of a prefix first, and nothing stays counted."""

from __future__ import annotations

import random

import pytest

from engine.protocol import InvalidRequest, RankLoad
from engine.ranks import Ranks
from kv_transfer.prefix import block_keys

BLOCK = 4


def ranks(blocks_max: int = 100) -> Ranks:
    return Ranks(2, block_size_tokens=BLOCK, blocks_max=blocks_max)


def prompt(seed: int, tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(tokens)]


def test_a_prompt_goes_where_the_fewest_tokens_wait() -> None:
    made = ranks()
    assert made.choose("long", prompt(1, 40)) == 0
    assert [made.choose(f"short {n}", prompt(n, 10)) for n in (2, 3, 4, 5)] == [1, 1, 1, 1]
    made.computed("long")
    assert made.choose("next", prompt(6, 10)) == 0


def test_the_rank_that_holds_the_prefix_gets_it_unless_it_is_busier_than_that_saves() -> None:
    made, shared = ranks(), prompt(1, 24)
    assert made.choose("first", shared) == 0
    made.ended("first")
    made.choose("other", prompt(2, 12))
    # Rank 0 has 12 tokens to compute, and would save 24.
    assert made.choose("again", [*shared, 1, 2]) == 0
    assert made.choose("much", prompt(3, 40)) == 1
    made.ended("much")
    made.choose("more", prompt(4, 40))
    busy = 0 if made._ranks[0].queued_tokens > made._ranks[1].queued_tokens else 1
    assert made.choose("elsewhere", prompt(5, 8)) == 1 - busy


def test_prompts_with_one_system_prompt_do_not_all_decode_on_one_rank() -> None:
    made, shared = Ranks(4, block_size_tokens=BLOCK, blocks_max=10_000), prompt(0, 2000)
    chosen = []
    for n in range(400):
        chosen.append(made.choose(str(n), [*shared, *prompt(n + 1, 20)]))
        made.computed(str(n))
    # A few on one rank share its prefix before the next rank computes it.
    assert chosen[:5] == [0] * 5
    counted = [chosen.count(rank) for rank in range(4)]
    assert max(counted) - min(counted) <= 5, counted


def test_the_beginning_of_a_prompt_is_remembered_longest() -> None:
    made, shared = ranks(blocks_max=6), prompt(1, 6 * BLOCK)
    made.choose("first", shared)
    made.choose("beside", prompt(2, 6 * BLOCK))
    made.ended("first")
    # Four blocks of another prompt leave room for two on rank 0.
    assert made.choose("four", prompt(3, 4 * BLOCK)) == 0
    keys = block_keys.extend(block_keys.root(), shared, BLOCK)
    assert made._held(made._ranks[0], keys) == 2 * BLOCK


def test_a_prefix_of_another_salt_is_another_one() -> None:
    made, shared = ranks(), prompt(1, 24)
    made.choose("first", shared, salt="a")
    made.ended("first")
    made.choose("running", prompt(2, 4))
    assert made.choose("again", shared, salt="a") == 0
    assert made.choose("other", shared, salt="b") == 1


def test_requests_whose_prompts_are_computed_elsewhere_spread_by_number() -> None:
    made = ranks()
    assert [made.choose(str(n), prompt(n, 20), comes_with_kv=True) for n in range(4)] == [0, 1, 0, 1]
    made.ended("0")
    made.ended("2")
    assert made.choose("next", prompt(9, 20), comes_with_kv=True) == 0


def test_what_ended_is_counted_no_more_and_memory_is_bounded() -> None:
    made = ranks(blocks_max=5)
    for n in range(50):
        made.choose(str(n), prompt(n, 16))
        if n % 2:
            made.computed(str(n))
            made.computed(str(n))
    for n in range(50):
        made.ended(str(n))
        made.ended(str(n))
    assert [(rank.queued_tokens, rank.requests) for rank in made._ranks] == [(0, 0), (0, 0)]
    assert max(len(rank.blocks) for rank in made._ranks) == 5 and made._running == {}


def test_the_rank_of_the_plan_is_taken_and_counted() -> None:
    made = ranks()
    assert [made.choose(str(n), prompt(1, 10), named=1) for n in range(3)] == [1, 1, 1]
    with pytest.raises(InvalidRequest, match="rank 2"):
        made.choose("elsewhere", prompt(1, 10), named=2)
    made.computed("0")
    busy = RankLoad(requests_running=2, requests_waiting=1, kv_blocks_used=9, prefill_tokens_queued=20)
    assert made.loads([1, 1], [0, 9]) == (RankLoad(), busy)
    for n in range(3):
        made.ended(str(n))
    assert made.loads([0, 0], [0, 0]) == (RankLoad(), RankLoad())
