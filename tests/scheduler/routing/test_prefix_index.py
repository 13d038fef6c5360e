"""The prefix index against a naive model, its bounds, and the guess for engines without events."""

from __future__ import annotations

import gc
import random

import pytest

from kv_transfer.prefix.block_keys import pack_keys
from kv_transfer.prefix.events import GONE, Medium
from scheduler.routing.prefix_index import PrefixIndex
from scheduler.routing.routed_blocks import RoutedBlocks

CHAIN = list(range(1, 200))


def put(index: PrefixIndex, holder: int, level: int, keys: list[int]) -> None:
    assert index.put(holder, level, keys)


@pytest.mark.parametrize("seed", range(40))
def test_every_length_is_that_of_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex(blocks_max=10_000)
    model: dict[int, tuple[int, int]] = {}
    for _ in range(200):
        holder = rng.choice(sorted(model)) if model and rng.random() < 0.9 else index.add()
        model.setdefault(holder, (0, 0))
        match rng.randrange(6):
            case 0:
                index.retire(holder)
                del model[holder]
            case 1:
                index.sweep(rng.randrange(400))
            case _:
                new_hbm = rng.randrange(len(CHAIN) + 1)
                new_host = rng.randrange(new_hbm, len(CHAIN) + 1)
                put(index, holder, Medium.HBM, CHAIN[:new_hbm])
                put(index, holder, Medium.HOST, CHAIN[new_hbm:new_host])
                put(index, holder, GONE, CHAIN[new_host:])
                model[holder] = (new_hbm, new_host)
        length = rng.randrange(1, len(CHAIN) + 1)
        packed = pack_keys(CHAIN[:length])
        for medium in Medium:
            lengths = {each: runs[min(medium, Medium.HOST)] for each, runs in model.items()}
            expected = {each: min(length, run) for each, run in lengths.items() if run}
            assert index.longest(packed, medium) == expected
    for holder in model:
        index.retire(holder)
    index.sweep(1_000)
    assert len(index) == 0


def test_a_prompt_without_a_full_block_is_held_nowhere() -> None:
    index = PrefixIndex(blocks_max=10)
    index.add()
    assert index.longest(b"") == {}


def test_garbage_collection_looks_at_no_block() -> None:
    index = PrefixIndex(blocks_max=10_000)
    for holder in [index.add() for _ in range(4)]:
        put(index, holder, Medium.HBM, list(range(holder * 1000, holder * 1000 + 2000)))
    put(index, 0, GONE, list(range(1500, 2000)))
    looked_at, due = 0, [index]
    while due:
        found = [each for each in gc.get_referents(due.pop()) if not isinstance(each, type)]
        looked_at += len(found)
        due.extend(each for each in found if gc.is_tracked(each))
    assert looked_at < 1000 < len(index)


def test_a_hidden_holder_is_in_no_answer_and_a_retired_number_comes_back_empty() -> None:
    index = PrefixIndex(blocks_max=100)
    first, second = index.add(), index.add()
    for holder in (first, second):
        put(index, holder, Medium.HBM, CHAIN[:10])
    index.show(first, shown=False)
    assert index.longest(pack_keys(CHAIN)) == {second: 10}
    index.show(first, shown=True)
    index.retire(second)
    assert index.longest(pack_keys(CHAIN)) == {first: 10}
    assert index.add() not in (first, second)
    index.sweep(100)
    assert index.add() == second
    assert index.longest(pack_keys(CHAIN)) == {first: 10}


def test_a_full_index_says_so_and_takes_no_more() -> None:
    index = PrefixIndex(blocks_max=5)
    first, second = index.add(), index.add()
    assert not index.put(first, Medium.HBM, CHAIN[:10])
    assert len(index) == 5
    assert index.put(second, Medium.HBM, CHAIN[:5])  # blocks that are there already take no room


def test_holders_that_come_and_go_leave_a_bounded_remainder() -> None:
    index = PrefixIndex(blocks_max=10_000)
    for turn in range(500):
        holder = index.add()
        put(index, holder, Medium.HBM, [turn * 100 + block for block in range(10)])
        index.retire(holder)
    assert len(index) <= 1000


def test_routed_prompts_are_held_until_they_expire() -> None:
    index = PrefixIndex(blocks_max=1000)
    routed = RoutedBlocks(index, ttl_s=10.0)
    holder = routed.add(100, now_s=0.0)
    routed.routed(holder, pack_keys(CHAIN[:20]), 1.0)
    routed.routed(holder, pack_keys(CHAIN[:8]), 5.0)
    for now_s, expected in ((5.0, 20), (9.9, 20), (10.0, 8), (14.0, 8)):
        routed.expire(now_s)
        assert index.longest(pack_keys(CHAIN)) == {holder: expected}
    routed.expire(15.0)
    assert index.longest(pack_keys(CHAIN)) == {} and len(index) == 0
    routed.routed(holder, pack_keys(CHAIN[:20]), 16.0)
    routed.expire(1000.0)
    assert len(index) == 0


def test_no_more_is_guessed_than_the_engine_has_room_for() -> None:
    index = PrefixIndex(blocks_max=1000)
    routed = RoutedBlocks(index, ttl_s=1e9)
    holder = routed.add(20, now_s=0.0)
    for turn in range(50):
        routed.routed(holder, pack_keys([turn * 100 + block for block in range(7)]), float(turn))
        assert len(index) <= 20
    assert index.longest(pack_keys([4900 + block for block in range(7)])) == {holder: 7}
    routed.routed(holder, pack_keys(CHAIN), 60.0)
    assert index.longest(pack_keys(CHAIN)) == {holder: 10}
    routed.retire(holder)
    assert index.longest(pack_keys(CHAIN)) == {}


def test_guesses_that_find_the_index_full_are_dropped() -> None:
    index = PrefixIndex(blocks_max=10)
    routed = RoutedBlocks(index, ttl_s=10.0)
    holder = routed.add(100, now_s=0.0)
    routed.routed(holder, pack_keys(CHAIN[:6]), 0.0)
    routed.routed(holder, pack_keys(CHAIN[50:60]), 0.0)
    assert len(index) == 0
