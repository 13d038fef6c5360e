"""Ranks come and go: the fewest moves, a valid placement, balance; and how many slots to buy."""

from __future__ import annotations

import numpy as np
import pytest

from bench.experts.counts import made
from scheduler.experts import advice, elastic, solver
from scheduler.experts.solver import BadSizes, Shape

COUNTS = made(0)["decode_2"]
LIVE = solver.fresh(COUNTS, Shape(32, 288)).slots


def test_new_gpus_are_filled_and_nothing_else_moves() -> None:
    grown = elastic.join(COUNTS, LIVE, 40)
    assert grown.moves.sum() / 58 == grown.fewest == 8 * 9
    assert (grown.placed.slots[:, :32] == LIVE).all() and grown.placed.slots.shape == (58, 40, 9)
    assert solver.balance_of(grown.placed, COUNTS) > 0.99


@pytest.mark.parametrize(("lost", "least"), [({7}, 0.85), ({0, 16}, 0.8)])
def test_a_lost_gpu_costs_one_move_for_each_expert_that_it_alone_held(lost: set[int], least: float) -> None:
    repaired = elastic.leave(COUNTS, LIVE, frozenset(lost))
    kept = np.delete(LIVE, sorted(lost), axis=1)
    alone = sum(len(set(range(256)) - set(layer.ravel())) for layer in kept)
    assert repaired.moves.sum() == repaired.without_donor == alone == round(repaired.fewest * 58)
    assert repaired.placed.slots.shape == (58, 32 - len(lost), 9)
    assert solver.balance_of(repaired.placed, COUNTS) > least


def test_too_few_slots_left_or_no_new_gpu_is_refused() -> None:
    with pytest.raises(BadSizes, match="27 with 9 slots hold no 256 experts"):
        elastic.leave(COUNTS, LIVE, frozenset(range(5)))
    with pytest.raises(BadSizes, match="ranks: 32 are no more than the 32 there are"):
        elastic.join(COUNTS, LIVE, 32)


def test_advice_ends_at_the_first_number_of_slots_that_reaches_the_target() -> None:
    rows = advice.advise(COUNTS, 64, target=0.98, expert_bytes=44_000_000, kv_bytes_per_token=70_000)
    assert [row.slots_per_rank for row in rows] == [4, 5]
    assert [row.reaches_target for row in rows] == [False, True]
    assert rows[0].balance < 0.8 and rows[0].extra_bytes_per_rank == rows[0].kv_tokens_lost == 0
    assert rows[1].extra_bytes_per_rank == 58 * 44_000_000 and rows[1].kv_tokens_lost == 58 * 44_000_000 // 70_000
    assert all(row.balance <= row.bound for row in rows)
