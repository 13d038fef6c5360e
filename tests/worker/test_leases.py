"""The table of leases: each ends once, whatever comes, and nothing outlives its bound."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.leases import Count, FreeBlocks, LeaseAction, LeaseTable


def freed(actions: Sequence[LeaseAction]) -> list[str]:
    return [action.lease_id for action in actions if isinstance(action, FreeBlocks)]


def table_of(*leases: tuple[str, int]) -> LeaseTable:
    table = LeaseTable()
    for lease_id, owner in leases:
        table.offer(lease_id, owner=owner, blocks=2, now_s=0.0, expires_at_s=10.0)
    return table


def test_a_stream_that_ends_takes_only_its_own_leases() -> None:
    table = table_of(("a", 1), ("b", 2), ("c", 1))
    assert freed(table.owner_gone(1)) == ["a", "c"]
    assert "b" in table and (len(table), table.blocks) == (1, 2)


def test_only_leases_that_ran_out_expire() -> None:
    table = table_of(("a", 1))
    table.offer("b", owner=1, blocks=1, now_s=0.0, expires_at_s=20.0)
    assert [freed(table.tick(now_s)) for now_s in (9.9, 10.0, 30.0)] == [[], ["a"], ["b"]]


def test_a_renewal_never_shortens_a_lease_and_nothing_outlives_the_bound() -> None:
    table = table_of(("a", 1))
    assert table.renew("a", now_s=1.0, lease_s=2.0, total_max_s=100.0) == ()
    assert freed(table.tick(9.9)) == []
    for second in range(100):
        table.renew("a", now_s=float(second), lease_s=10.0, total_max_s=40.0)
        table.tick(float(second))
        assert ("a" in table) is (second < 40)


@pytest.mark.parametrize("now_s", [10.0, 11.0])
def test_a_lease_that_ran_out_is_not_renewed_although_it_has_not_been_ended_yet(now_s: float) -> None:
    table = table_of(("a", 1))
    assert table.renew("a", now_s=now_s, lease_s=30.0, total_max_s=100.0) == (Count("renewed_too_late"),)
    assert freed(table.tick(now_s)) == ["a"]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "renew", "pulled", "release", "stream", "tick", "engine"]),
        st.integers(0, 5),
        st.floats(0, 20),
    ),
    max_size=80,
)


@given(OPERATIONS)
def test_however_a_lease_ends_it_ends_once_and_frees_at_most_once(steps: list[tuple[str, int, float]]) -> None:
    table = LeaseTable()
    held: set[str] = set()
    now_s = 0.0
    for number, (what, key, add_s) in enumerate(steps):
        now_s += add_s
        name = f"l{key}"
        actions: Sequence[LeaseAction] = ()
        match what:
            case "offer" if name not in table:
                actions = table.offer(name, owner=number % 3, blocks=key + 1, now_s=now_s, expires_at_s=now_s + 15)
                held.add(name)
            case "renew":
                actions = table.renew(name, now_s=now_s, lease_s=15.0, total_max_s=40.0)
            case "pulled":
                actions = table.pulled(name)
            case "release":
                actions = table.release(name)
            case "stream":
                actions = table.owner_gone(key % 3)
            case "tick":
                actions = table.tick(now_s)
            case "engine":
                actions = table.holder_gone()
            case _:
                pass
        table.check()
        left = {name for name in held if name in table}
        ends = [each.what for each in actions if isinstance(each, Count) and not each.what.startswith(("ren", "off"))]
        assert len(ends) == len(held - left)
        assert sorted(freed(actions)) == (sorted(held - left) if {"released", "expired"} & set(ends) else [])
        held = left
    assert sorted(freed(table.tick(now_s + 1000))) == sorted(held)
    assert (len(table), table.blocks) == (0, 0)
