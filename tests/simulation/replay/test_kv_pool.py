"""Blocks of a simulated worker: shared, evicted, and none lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulation.replay.kv_pool import KvPool


def test_a_prefix_is_shared_while_it_is_held_and_kept_while_there_is_room() -> None:
    pool = KvPool(10, key_blocks=2)
    assert pool.admit((1, 2), 5) == 0
    pool.publish((1, 2))
    assert pool.changes() == ((1, 2), ())
    assert pool.admit((1, 2, 3), 6) == 2
    assert pool.used == 5 + 2, "four of its six blocks are shared"
    pool.release((1, 2), 1)
    pool.release((1, 2), 2)
    assert (pool.used, pool.hits((1, 2, 3))) == (0, 2)
    pool.check()


def test_the_least_recently_used_go_first_and_of_one_request_the_end_of_its_prompt() -> None:
    pool = KvPool(8, key_blocks=2)
    for keys in ((1, 2), (3, 4)):
        assert pool.admit(keys, 4) == 0
        pool.publish(keys)
        pool.release(keys, 0)
    pool.changes()
    pool.grow(1)
    assert pool.changes() == ((), (2,))
    pool.grow(3)
    assert pool.changes() == ((), (1,))
    assert (pool.hits((1, 2)), pool.hits((3, 4))) == (0, 2)


def test_a_request_without_room_changes_nothing() -> None:
    pool = KvPool(4, key_blocks=2)
    assert pool.admit((1,), 2) == 0
    pool.publish((1,))
    pool.release((1,), 0)
    # The idle blocks that it would share are no room for the rest of it.
    assert pool.admit((1, 2, 3), 5) is None
    assert (pool.used, pool.hits((1,))) == (0, 1)
    assert pool.admit((1, 2), 4) == 1
    assert pool.free == 0


def test_blocks_that_two_requests_computed_are_kept_once() -> None:
    pool = KvPool(8, key_blocks=2)
    assert pool.admit((1,), 3) == pool.admit((1,), 3) == 0
    pool.publish((1,))
    pool.publish((1,))
    assert pool.used == 4
    pool.release((1,), 1)
    pool.release((1,), 1)
    assert pool.used == 0
    pool.check()


_prompts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 3)), max_size=60)


@given(_prompts)
def test_no_block_is_lost_whatever_comes_and_goes(prompts: list[tuple[int, int, int]]) -> None:
    pool, held, known = KvPool(24, key_blocks=2), list[tuple[tuple[int, ...], int]](), set[int]()
    for family, length, action in prompts:
        keys = tuple(family * 10 + index for index in range(length))
        if action == 0 and held:
            pool.release(*held.pop(0))
        elif (shared := pool.admit(keys, 2 * length + 1)) is not None:
            pool.publish(keys[shared:])
            held.append((keys, 1))
        came, went = pool.changes()
        known = (known | set(came)) - set(went)
        assert pool.used == 2 * len({key for keys, _ in held for key in keys}) + len(held)
        assert all(pool.hits((key,)) == (key in known) for key in range(40)), "a follower of the changes knows all"
        pool.check()
    for keys, own in held:
        pool.release(keys, own)
    assert pool.used == 0
