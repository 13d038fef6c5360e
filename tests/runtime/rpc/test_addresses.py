"""Which address is tried after which, which is passed over, and when there is a pause."""

from __future__ import annotations

from runtime.rpc.addresses import TURNS_WITHOUT_SILENT, Addresses


def test_addresses_take_turns_and_pause_once_a_round() -> None:
    addresses = Addresses("a:1, b:2")
    assert (len(addresses), addresses.current) == (2, "a:1")
    turns = []
    for _ in range(4):
        turns.append((addresses.failed(), addresses.current))
    assert turns == [(False, "b:2"), (True, "a:1"), (False, "b:2"), (True, "a:1")]
    none, alone = Addresses(""), Addresses("a:1")
    assert (none.failed(), none.current) == (True, "")
    assert (alone.failed(), alone.failed(silent=True), alone.current) == (True, True, "a:1")


def test_after_one_that_served_there_is_a_pause_first() -> None:
    addresses = Addresses("a:1,b:2")
    addresses.served()
    assert (addresses.failed(), addresses.current) == (True, "b:2")


def test_one_that_is_silent_is_passed_over_for_a_while() -> None:
    addresses = Addresses("a:1,b:2,c:3")
    addresses.failed(silent=True)
    tried = []
    while addresses.current != "a:1":
        tried.append(addresses.current)
        addresses.failed()
    # Each round of the others costs it one turn.
    assert tried == ["b:2", "c:3"] * (TURNS_WITHOUT_SILENT + 1)


def test_silence_is_forgotten_once_one_served() -> None:
    addresses = Addresses("a:1,b:2")
    addresses.failed(silent=True)
    addresses.served()
    addresses.failed()
    assert addresses.current == "a:1"


def test_where_all_are_silent_each_has_its_turn() -> None:
    addresses = Addresses("a:1,b:2")
    tried = []
    for _ in range(6):
        tried.append(addresses.current)
        addresses.failed(silent=True)
    assert tried == ["a:1", "b:2"] * 3
    alone = Addresses("a:1")
    alone.failed(silent=True)
    assert alone.current == "a:1"
