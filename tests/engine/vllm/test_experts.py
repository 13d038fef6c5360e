"""What Baton changes in vLLM for experts: guarded by source, right ids, uneven columns, and switched on only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.distributed.eplb.eplb_state import EplbState

from engine.expert_map import COLUMNS, ExpertMap
from engine.vllm.experts import on_cpu, patch, placement
from tests.engine.test_expert_map import SLOTS


def test_this_vllm_is_the_one_that_the_patches_are_for() -> None:
    assert placement.objection() == ""


def test_another_source_or_version_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EplbState, "step", lambda self: None)
    assert "EplbState.step is" in placement.objection() and "Baton knows" in placement.objection()
    monkeypatch.setattr(patch, "VERSION", "0.31.0")
    assert placement.objection() == "Baton knows where to place experts in vLLM 0.31.0, and this is 0.32.0"


def test_a_patch_goes_in_once() -> None:
    class Owner:
        def one(self) -> int:
            return 1

    digest = patch.digest_of(Owner.one)
    for _ in range(2):
        patch.replace(Owner, "one", digest, lambda original: lambda self: original(self) + 1)
    assert Owner().one() == 2


def test_rows_spread_over_the_copies_as_the_columns_say_and_only_real_ones_count() -> None:
    placed = ExpertMap.shared(3, SLOTS, torch.tensor([[[1.0, 5], [5, 3]], [[1, 5], [5, 7]]]).numpy())
    table = torch.full((3, 1024), -1, dtype=torch.int64)
    table[:, :COLUMNS] = torch.from_numpy(placed.physical()[0])
    counted = torch.zeros(4, dtype=torch.int32)
    ids = torch.zeros((1000, 1), dtype=torch.int32)
    physical = on_cpu.map_and_record(
        ids, counted, table, torch.full((3,), COLUMNS), torch.tensor(True), torch.tensor(800, dtype=torch.int32)
    )
    # Expert 0 is in slots 0 and 3, a quarter of its tokens in the first.
    assert set(physical.flatten().tolist()) == {0, 3} and physical.dtype == ids.dtype
    assert counted.sum() == 800 and counted[0].item() == pytest.approx(200, abs=8)
    on_cpu.map_and_record(ids, counted, table, torch.full((3,), COLUMNS), torch.tensor(False))
    assert counted.sum() == 800


def test_experts_of_other_ranks_get_no_weight() -> None:
    seen: dict[str, Any] = {}

    def kernel(_self: Any, *given: Any, **_named: Any) -> None:
        seen["weights"], seen["ids"] = given[4], given[5]

    apply = on_cpu._with_local_ids(kernel)
    ids, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    apply(None, None, None, None, None, weights, ids, None, 4, torch.tensor([-1, -1, 0, 1]))
    assert seen["ids"].tolist() == [[0, 1], [0, 0]]
    assert seen["weights"].tolist() == [[0, pytest.approx(0.1)], [pytest.approx(0.6), 0]]
