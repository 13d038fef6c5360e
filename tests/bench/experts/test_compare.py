"""`python -m bench experts`: the JSON that others rely on, vLLM's own definition, and formats of counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.experts import compare, peers
from bench.experts.counts import BadCounts, made, read, read_file
from engine.expert_map import balance, check_slots
from scheduler.experts.solver import Shape


def test_the_report_has_a_row_for_each_policy_and_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "counts", tmp_path / "out.json"
    folder.mkdir()
    for name in ("decode_0", "decode_1"):
        dumped = [[0] * 256] * 3 + made(0)[name][:6].astype(int).tolist()
        (folder / f"{name}.json").write_text(json.dumps({"logical_count": dumped}))
    words = ["--counts", str(folder), "--gpus", "32", "--nodes", "4", "--slots", "288", "--json", str(output)]
    assert main(["experts", *words]) == 0
    report = json.loads(output.read_text())
    assert {(row["workload"], row["policy"]) for row in report["rows"]} == {
        (name, policy)
        for name in ("decode_0", "decode_1")
        for policy in ("baton", "vllm_default", "global_greedy")
    }  # fmt: skip
    fields = {"workload", "policy", "balance_mean", "balance_worst_layer", "bound", "seconds"}
    assert all(set(row) == fields for row in report["rows"])
    changed = {change["policy"]: change for change in report["changes"] if change["to"] == "decode_1"}
    assert set(changed["baton"]) == {
        "from", "to", "policy", "balance_before", "balance_after", "moves_per_layer"
    }  # fmt: skip
    assert changed["baton"]["moves_per_layer"] <= changed["vllm_default"]["moves_per_layer"] / 8
    assert changed["baton"]["balance_after"] > changed["vllm_default"]["balance_after"]
    noise = [change for change in report["changes"] if change["to"].endswith(" again")]
    assert all(change["moves_per_layer"] == 0 for change in noise if change["policy"] == "baton")
    assert all(change["moves_per_layer"] <= 4 for change in noise if change["policy"] == "baton_unguarded")
    assert "vllm_default" in capsys.readouterr().out


def test_the_peers_are_vllms_policy_and_the_balance_is_vllms() -> None:
    counts, shape = made(0)["decode_0"][:4], Shape(32, 288, nodes=4, groups=8)
    hierarchical, greedy = (getattr(peers, name)(counts, shape, None) for name in ("vllm_default", "global_greedy"))
    for slots in (hierarchical, greedy):
        assert slots.shape == (4, 32, 9) and all(set(layer.ravel()) == set(range(256)) for layer in slots)
    assert balance(compare.even_loads(counts, hierarchical)) < balance(compare.even_loads(counts, greedy))
    # As vLLM's EPLB logs it: mean load of ranks over the highest, each summed over layers.
    loads = torch.from_numpy(compare.even_loads(counts, greedy))
    theirs = loads.mean(dim=1).sum() / loads.max(dim=1).values.sum()
    assert balance(loads.numpy()) == pytest.approx(float(theirs))
    with pytest.raises(ValueError, match="twice"):
        check_slots(np.zeros((1, 1, 2), int), 1)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"logical_count": 3}', '{"logical_count": [["a"]]}', '{"logical_count": [[0, 0]]}']
)
def test_a_file_without_counts_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(BadCounts, match=r"a\.json"):
        read_file(file)


def test_steps_are_summed_dense_layers_left_out_and_one_shape_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"logical_count": [[[0, 0], [1, 2]], [[0, 0], [3, 4]]]}')
    assert read(tmp_path)["a"].tolist() == [[4, 6]]
    (tmp_path / "b.json").write_text('{"logical_count": [[1, 2, 3]]}')
    with pytest.raises(BadCounts, match="different shapes"):
        read(tmp_path)
    with pytest.raises(BadCounts, match="no folder"):
        read(tmp_path / "none")
