"""Three speeds, and what holds each back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.experts.counts import drawn, made
from engine.expert_map import Array, ExpertMap
from scheduler.experts import solver
from scheduler.experts.decide import Bounds, Change, Proposal, decide, window
from scheduler.experts.solver import Shape
from scheduler.experts.statistics import Statistics

WORKLOADS = made(0)
SHAPE = Shape(32, 288)
LIVE = solver.fresh(WORKLOADS["decode_1"], SHAPE)
EXPERT_BYTES = 44_000_000


def decided(
    counts: Array, live: ExpertMap = LIVE, bounds: Bounds | None = None, *, tokens: float = 1e6, **known: Any
) -> Proposal:
    return decide(
        counts, live, SHAPE, tokens=tokens, expert_bytes=EXPERT_BYTES, bounds=bounds or Bounds(), **known
    )  # fmt: skip


def test_noise_changes_nothing() -> None:
    for seed, tokens in ((1, 1_000_000), (2, 300_000), (3, 70_000)):
        again = drawn(WORKLOADS["decode_1"], tokens, np.random.default_rng(seed))
        made = decided(again, tokens=tokens)
        assert (made.change, made.placed, made.moves) == (Change.KEEP, None, 0)


def test_new_traffic_moves_few_experts_for_much_balance() -> None:
    made = decided(WORKLOADS["decode_2"])
    assert made.change == Change.INCREMENTAL and made.placed is not None
    assert made.balance_before < 0.85 and made.balance_after > 0.98 and made.balance_after <= made.bound
    assert 0 < made.moves <= 32 * 58 and made.bytes_moved == made.moves * EXPERT_BYTES
    assert "for a stall of" in made.why


def test_moves_wait_for_their_cool_down_and_the_split_does_not() -> None:
    made = decided(WORKLOADS["decode_2"], since_moves_s=5)
    assert made.change == Change.RESPLIT and made.moves == 0 and made.placed is not None
    assert made.balance_after > made.balance_before + 0.05
    assert decided(WORKLOADS["decode_2"], since_moves_s=5, since_resplit_s=5).change == Change.KEEP


@pytest.mark.parametrize("bounds", [Bounds(move_bytes_per_s=1e6), Bounds(bytes_max=0), Bounds(horizon_s=0.001)])
def test_moves_that_cost_more_than_they_save_are_not_made(bounds: Bounds) -> None:
    assert decided(WORKLOADS["decode_2"], bounds=bounds).change == Change.RESPLIT


def test_a_budget_in_bytes_holds() -> None:
    made = decided(WORKLOADS["decode_2"], bounds=Bounds(bytes_max=200 * EXPERT_BYTES))
    assert made.change == Change.INCREMENTAL and made.moves <= 200


def test_few_tokens_say_nothing() -> None:
    assert decided(WORKLOADS["decode_2"], tokens=63_000).why == "63000 tokens of 64000 that say enough"


def test_other_ranks_or_slots_need_a_full_plan() -> None:
    made = decide(
        WORKLOADS["decode_1"], LIVE, Shape(16, 288), tokens=1e6, expert_bytes=EXPERT_BYTES, bounds=Bounds()
    )  # fmt: skip
    assert made.change == Change.FULL and made.placed is not None and made.placed.slots.shape == (58, 16, 18)


def test_the_short_window_counts_once_traffic_has_changed() -> None:
    statistics = Statistics(1, 2)
    for sequence in range(200):
        statistics.add(0, sequence, 10_000, np.array([[9_000.0, 1_000]]))
    assert window(statistics, Bounds())[0] is statistics.long.counts
    for sequence in range(200, 208):
        statistics.add(0, sequence, 10_000, np.array([[1_000.0, 9_000]]))
    counts, tokens = window(statistics, Bounds())
    assert counts is statistics.short.counts and tokens >= Bounds().tokens_min
