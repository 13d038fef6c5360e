"""The table of leases: each ends once, whatever comes. Single endings: ``tests/golden/leases.txt``."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from worker.leases import Count, FreeBlocks, LeaseAction, LeaseTable


def freed(actions: Sequence[LeaseAction]) -> list[str]:
    return [action.lease_id for action in actions if isinstance(action, FreeBlocks)]


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
