"""A map of experts: what is refused and how it is named, columns, digest, bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.expert_map import COLUMNS, BadExpertMap, ExpertMap, balance

SLOTS = np.array([[[0, 1], [2, 0]], [[1, 2], [0, 1]]])


@pytest.mark.parametrize(
    ("at", "expert", "told"),
    [
        ((1, 0, 1), 0, "layer 1: no rank holds expert 2"),
        ((0, 0, 1), 0, "layer 0: rank 0 holds expert 0 twice"),
        ((1, 1, 0), 3, "layer 1: rank 1 holds expert 3 of 3"),
        ((1, 1, 0), -1, "layer 1: rank 1 holds expert -1 of 3"),
    ],
)
def test_a_map_that_misses_or_doubles_an_expert_is_refused_by_layer_and_expert(
    at: tuple[int, int, int], expert: int, told: str
) -> None:
    slots = SLOTS.copy()
    slots[at] = expert
    with pytest.raises(BadExpertMap, match=told):
        ExpertMap.shared(3, slots)


def test_columns_that_do_not_add_up_are_refused() -> None:
    good = ExpertMap.shared(3, SLOTS)
    columns = good.columns.copy()
    columns[1, 0, 1] -= 1
    with pytest.raises(BadExpertMap, match="layer 1: expert 2 has 255 columns, not 256"):
        ExpertMap(3, SLOTS, columns)
    columns = good.columns.copy()
    columns[0, 0, 0], columns[0, 1, 1] = -1, COLUMNS + 1
    with pytest.raises(BadExpertMap, match="layer 0: expert 0"):
        ExpertMap(3, SLOTS, columns)
    with pytest.raises(BadExpertMap, match="both need 3 dimensions"):
        ExpertMap(3, SLOTS, columns[0])


def test_columns_follow_the_parts_and_every_column_leads_to_a_slot_of_its_expert() -> None:
    parts = np.array([[[1.0, 5], [5, 3]], [[0, 5], [5, 7]]])
    placed = ExpertMap.shared(3, SLOTS, parts)
    assert placed.columns[0, 0, 0] == COLUMNS // 4 and placed.columns[0, 1, 1] == COLUMNS * 3 // 4
    assert placed.columns[1, 0, 0] == 0  # a copy that gets nothing is allowed
    physical = placed.physical()
    assert physical.shape == (2, 3, COLUMNS)
    assert (SLOTS.reshape(2, 4)[np.arange(2)[:, None, None], physical] == np.arange(3)[None, :, None]).all()
    assert (physical[0, 0] == 0).sum() == COLUMNS // 4
    assert placed.loads(np.array([[4.0, 5, 5], [5, 7, 5]])).tolist() == [[6, 8], [5, 12]]
    assert balance(np.array([[6, 8], [5, 12.0]])) == (7 + 8.5) / 20


def test_a_digest_is_of_slots_columns_and_shape_and_survives_the_wire() -> None:
    placed = ExpertMap.shared(3, SLOTS)
    again = ExpertMap.parse(3, 2, 2, placed.slots_bytes, placed.columns_bytes)
    assert again.digest == placed.digest < 2**63
    assert (again.slots == placed.slots).all() and (again.columns == placed.columns).all()
    other = ExpertMap.shared(3, SLOTS, np.arange(8.0).reshape(2, 2, 2) + 1)
    assert other.digest != placed.digest
    swapped = SLOTS.copy()
    swapped[0, 0] = [1, 0]
    assert ExpertMap.shared(3, swapped).digest != placed.digest
    for layers, ranks, slots in ((0, 2, b"ab"), (2, 2, b"abc"), (2, 2, b"")):
        with pytest.raises(BadExpertMap, match="are no whole slots"):
            ExpertMap.parse(3, layers, ranks, slots, slots)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_every_split_becomes_whole_columns_near_it(seed: int, ranks: int, width: int) -> None:
    chance = np.random.default_rng(seed)
    experts = int(chance.integers(width, ranks * width + 1))
    slots = chance.permutation(experts)[np.arange(ranks * width) % experts].reshape(1, ranks, width)
    parts = chance.random(slots.shape) * (chance.random(slots.shape) < 0.8)
    placed = ExpertMap.shared(experts, slots, parts)
    for expert in range(experts):
        mine = slots == expert
        if total := parts[mine].sum():
            assert (np.abs(placed.columns[mine] - parts[mine] / total * COLUMNS) < 1 + 1e-6).all()
