"""In which order a store's threads take up reads."""

from __future__ import annotations

from kv_transfer.stores.messages import ReadOrder
from kv_transfer.stores.store import side_by_side


def order(segment: str, position: int, slot: int, *, ahead: bool = False) -> ReadOrder:
    return ReadOrder(b"key", segment, position, slot, ahead)


def test_runs_are_read_in_turn_of_their_first_orders_whatever_their_segments_are_called() -> None:
    places = [("b", 3), ("b", 4), ("a", 0), ("c", 7), ("b", 2), ("a", 5)]
    orders = [order(*place, slot) for slot, place in enumerate(places)]
    runs = list(side_by_side(orders, 4096))
    assert [[each.slot for each in run] for run in runs] == [[4, 0, 1], [2], [3], [5]]


def test_a_run_has_reads_of_one_kind_and_is_no_longer_than_one_thread_reads_at_a_time() -> None:
    orders = [order("a", 0, 0), order("a", 1, 1, ahead=True), order("a", 2, 2), order("a", 3, 3), order("a", 4, 4)]
    runs = list(side_by_side(orders, 4 << 20))
    assert [[each.slot for each in run] for run in runs] == [[0], [1], [2, 3], [4]]
