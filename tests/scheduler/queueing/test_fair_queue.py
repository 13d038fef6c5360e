"""Which key is next: shares by weight and cost, and no credit for time away."""

from __future__ import annotations

import random
from collections import Counter

from scheduler.queueing.fair_queue import FairQueue


def serve(share: FairQueue, times: int) -> Counter[str]:
    served: Counter[str] = Counter()
    for _ in range(times):
        key = share.next_key()
        assert key is not None
        share.charge(key, 10.0)
        served[key] += 1
    return served


def shared(*keys: str, times: int = 20) -> FairQueue:
    """These keys wait, and were served so often."""
    share = FairQueue(10)
    for key in keys:
        share.enter(key)
    serve(share, times)
    return share


def test_a_key_that_was_away_is_owed_nothing_and_one_that_was_just_served_waits() -> None:
    share = shared("busy", times=100)
    share.enter("late")
    assert serve(share, 20) == {"busy": 10, "late": 10}
    share.leave("late")
    share.enter("late")
    assert abs(serve(share, 20)["late"] - 10) <= 1, "leaving and returning gains nothing"
    for key in ("busy", "late", "late"):
        share.leave(key)
    assert share.next_key() is None and len(share) == 0


def test_memory_is_bounded_by_the_waiting_keys_and_the_configured_number() -> None:
    share, rng = FairQueue(100), random.Random(1)
    for step in range(20_000):
        key = f"k{rng.randrange(5000)}"
        share.charge(key, rng.random())
        if step % 3 == 0:
            share.enter(key)
        if (turn := share.next_key()) is not None and step % 2:
            share.charge(turn, 1.0)
            share.leave(turn)
    assert len(share._starts) <= len(share) + 101
    assert len(share._heap) <= 2 * len(share) + 65
    for step in range(1_000):
        share.charge(f"debtor{step}", 1e6)
    assert len(share._starts) <= len(share) + 101


def test_memory_of_a_key_that_waits_long_while_others_are_served_is_bounded() -> None:
    share = shared("a", "b", times=0)
    for _ in range(1_000):
        share.charge("b", 1.0)
    assert share.next_key() == "a" and len(share._heap) <= 2 * len(share) + 65


def test_keys_that_owe_most_are_remembered_longest() -> None:
    share = FairQueue(4)
    share.enter("busy")
    share.charge("debtor", 1_000.0)
    serve(share, 10)
    for key in "stuvwxyz":
        share.charge(key, 1.0)
        serve(share, 2)
    share.enter("debtor")
    assert serve(share, 50) == {"busy": 50}


def test_virtual_time_does_not_go_back_when_a_key_is_credited() -> None:
    share = shared("a", "b")
    share.correct("a", -100.0)
    share.charge("a", 150.0)
    share.enter("c")
    assert abs(serve(share, 12)["c"] - 6) <= 1, "a key that comes now is owed nothing of what went back"


def test_a_charge_that_was_too_high_is_made_up_for_while_its_key_waits() -> None:
    share = shared("a", "b")
    for _ in range(8):
        share.correct("a", -10.0)
    assert serve(share, 8) == {"a": 8}
    assert serve(share, 10) == {"a": 5, "b": 5}


def test_a_charge_that_was_too_low_is_made_up_for_also_by_a_key_that_left() -> None:
    share = shared("a", "b")
    share.leave("a")
    share.correct("a", 50.0)
    share.enter("a")
    assert serve(share, 5) == {"b": 5}


def test_a_key_that_does_not_wait_gets_no_credit() -> None:
    share = shared("b", times=5)
    share.correct("a", -100.0)
    share.enter("a")
    assert abs(serve(share, 20)["a"] - 10) <= 1
    share.leave("a")
    share.correct("a", -100.0)
    share.enter("a")
    assert abs(serve(share, 20)["a"] - 10) <= 1


def test_a_new_key_stands_beside_the_one_that_is_furthest_behind() -> None:
    share = shared("a", "b")
    share.correct("a", -100.0)
    share.enter("c")
    assert serve(share, 10) == {"a": 5, "c": 5}


def test_corrections_keep_weights() -> None:
    share, weights = FairQueue(10), {"a": 4.0, "b": 1.0}
    for key, weight in weights.items():
        share.enter(key, weight)
    used = {"a": 0.0, "b": 0.0}
    for _ in range(1000):
        turn = share.next_key()
        assert turn is not None
        share.charge(turn, 10.0, weights[turn])
        actual = 2.0 if turn == "a" else 15.0
        share.correct(turn, actual - 10.0, weights[turn])
        used[turn] += actual
    assert abs(used["a"] / used["b"] - 4.0) < 0.1
