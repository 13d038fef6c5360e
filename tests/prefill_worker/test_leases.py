"""The table of leases: what is held, and that nothing is after any storm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff.lease import Count, FreeBlocks, LeaseAction
from prefill_worker.leases import LeaseTable


def freed(actions: object) -> list[str]:
    assert isinstance(actions, (list, tuple))
    return [action.lease_id for action in actions if isinstance(action, FreeBlocks)]


def table_of(*leases: tuple[str, int]) -> LeaseTable:
    table = LeaseTable()
    for lease_id, owner in leases:
        table.offer(lease_id, owner=owner, blocks=2, now_s=0.0, expires_at_s=10.0)
    return table


def test_a_release_frees_once_and_strangers_change_nothing() -> None:
    table = table_of(("a", 1))
    assert freed(table.release("x")) == []
    assert freed(table.release("a")) == ["a"]
    assert freed(table.release("a")) == []
    assert (len(table), table.blocks) == (0, 0)


def test_a_stream_that_ends_takes_only_its_own_leases() -> None:
    table = table_of(("a", 1), ("b", 2), ("c", 1))
    assert freed(table.owner_gone(1)) == ["a", "c"]
    assert "b" in table
    assert (len(table), table.blocks) == (1, 2)


def test_a_pull_ends_the_lease_without_freeing_what_the_transfer_layer_freed() -> None:
    table = table_of(("a", 1))
    assert table.pull_started("a") == []
    assert table.pulled("a") == [Count("pulled")]
    assert len(table) == 0


def test_only_leases_that_ran_out_expire() -> None:
    table = table_of(("a", 1))
    table.offer("b", owner=1, blocks=1, now_s=0.0, expires_at_s=20.0)
    assert freed(table.tick(9.9)) == []
    assert freed(table.tick(10.0)) == ["a"]
    assert freed(table.tick(30.0)) == ["b"]


def test_a_pull_of_what_is_gone_is_counted() -> None:
    assert table_of().pull_started("a") == (Count("pull_too_late"),)


def test_a_lease_offered_twice_is_a_bug_that_shows_its_event_log() -> None:
    table = table_of(("a", 1))
    with pytest.raises(AssertionError, match="offered twice; log: a:offered"):
        table.offer("a", owner=1, blocks=1, now_s=0.0, expires_at_s=1.0)


def test_a_second_word_that_the_pull_began_changes_nothing() -> None:
    table = table_of(("a", 1))
    table.pull_started("a")
    assert table.pull_started("a") == ()


def test_a_renewal_never_shortens_a_lease_and_nothing_outlives_the_bound() -> None:
    table = table_of(("a", 1))
    assert table.renew("a", now_s=1.0, lease_s=2.0, total_max_s=100.0) == []
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


def test_a_dead_engine_leaves_nothing_held_and_nothing_to_free() -> None:
    table = table_of(("a", 1), ("b", 2))
    assert freed(table.holder_gone()) == []
    assert len(table) == 0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "start", "renew", "pulled", "release", "gone", "tick"]),
        st.integers(0, 5),
        st.floats(0, 20),
    ),
    max_size=80,
)


@given(OPERATIONS)
def test_after_any_storm_every_lease_was_freed_pulled_or_is_still_held(steps: list[tuple[str, int, float]]) -> None:
    table = LeaseTable()
    offered = released = pulled = now_s = 0.0
    for number, (what, key, add_s) in enumerate(steps):
        now_s += add_s
        actions: list[LeaseAction] = []
        name = f"l{key}"
        match what:
            case "offer" if name not in table:
                actions += table.offer(name, owner=number % 3, blocks=key + 1, now_s=now_s, expires_at_s=now_s + 15)
                offered += 1
            case "start":
                actions += table.pull_started(name)
            case "renew":
                actions += table.renew(name, now_s=now_s, lease_s=15.0, total_max_s=40.0)
            case "pulled":
                actions += table.pulled(name)
            case "release":
                actions += table.release(name)
            case "gone":
                actions += table.owner_gone(key % 3)
            case "tick":
                actions += table.tick(now_s)
            case _:
                pass
        table.check()
        released += len(freed(actions))
        pulled += actions.count(Count("pulled"))
    assert offered == released + pulled + len(table)
    released += len(freed(table.tick(now_s + 1000)))
    assert offered == released + pulled
    assert (len(table), table.blocks) == (0, 0)
