"""Measured serving points: how they are read, and that the laws find what made them."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from bench.sizing.silicon import predict
from simulation.replay.cluster_model import StepTimes
from simulation.sizing import serving_law, silicon
from simulation.sizing.silicon import PARALLEL, BadSilicon, Point, Shape
from tests.simulation.replay.models import cluster_model

SHAPE = Shape(model="m", system="s", backend="vllm", precision="fp8", parallel=("2", "1", "1", "1", "1"))
LAW = StepTimes(fixed_s=0.006, prefill_token_s=2e-5, decode_request_s=4e-5, decode_sqrt_request_s=4e-4)
COLUMNS = ("model_path", "system", "backend", "precision", "mode", "isl", "osl", "batch_size", *PARALLEL)
MORE = ("silicon_data_source", "prefill_num_workers", "decode_num_workers", "silicon_ttft_ms", "silicon_tpot_ms")


def point(prompt: int, output: int, batch: int) -> Point:
    ttft_s = 0.02 + 2e-5 * prompt * (1.0 + 0.1 * batch**0.5)
    made = Point(shape=SHAPE, prompt_tokens=prompt, output_tokens=output, concurrency=batch, ttft_s=ttft_s, tpot_s=1.0)
    return replace(made, tpot_s=serving_law.shared_step_s(LAW, made))


POINTS = [
    point(prompt, output, batch)
    for (prompt, output), batch in itertools.product([(1024, 1024), (1024, 256), (8192, 1024)], [1, 4, 16, 64])
]


def row(each: Point, **changes: str) -> dict[str, str]:
    told = {
        "model_path": "m", "system": "s", "backend": "vllm", "precision": "fp8", "mode": "agg",
        "isl": f"{each.prompt_tokens}", "osl": f"{each.output_tokens}", "batch_size": f"{each.concurrency}",
        "silicon_ttft_ms": f"{each.ttft_s * 1e3}", "silicon_tpot_ms": f"{each.tpot_s * 1e3}",
    }  # fmt: skip
    return told | dict(zip(PARALLEL, SHAPE.parallel, strict=True)) | changes


def written(file: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS + MORE) -> Path:
    with file.open("w") as out:
        table = csv.DictWriter(out, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return file


def test_points_of_a_law_are_predicted_from_one_another() -> None:
    errors = serving_law.left_out(POINTS)
    assert sum(each.inner for each in errors) == 6
    assert sorted(each.tpot for each in errors)[len(errors) // 2] < 0.01
    assert max(each.tpot for each in errors) < 0.1
    assert sorted(each.ttft for each in errors)[len(errors) // 2] < 0.02


def test_what_the_law_misses_of_near_points_is_added() -> None:
    # As past some batch size, where an engine has no CUDA graph.
    off = [replace(each, tpot_s=each.tpot_s * (1.3 if each.concurrency > 4 else 1.0)) for each in POINTS]
    law = serving_law.fit(off)
    near = off[3]
    without = abs(serving_law.shared_step_s(law.step, near) / near.tpot_s - 1.0)
    assert abs(law.tpot_s(near) / near.tpot_s - 1.0) < without


def test_two_pools_are_predicted_from_laws_of_one_engine() -> None:
    law = serving_law.fit(POINTS)
    pools = silicon.Pools(prefill=1, decode=2, prefill_tensor_parallel=2, decode_tensor_parallel=2)
    few, many = (
        Point(shape=SHAPE, prompt_tokens=8192, output_tokens=64, concurrency=n, ttft_s=1, tpot_s=1, pools=pools)
        for n in (2, 64)
    )
    ttft_s, tpot_s = serving_law.disaggregated(law, law, few)
    assert tpot_s == pytest.approx(LAW.fixed_s + LAW.decode_s(1, 8224), rel=0.05)
    assert ttft_s < serving_law.disaggregated(law, law, many)[0]
    # All but those that decode wait at the one prefill worker.
    assert serving_law.disaggregated(law, law, many)[0] < 64 * 8192 * 2.1e-5


def test_repeated_points_are_merged_and_rows_without_counts_are_skipped(tmp_path: Path) -> None:
    apart = row(POINTS[0], mode="disagg", batch_size="", silicon_data_source="a; silicon_concurrency=8; b")
    counted = apart | {"prefill_num_workers": "1", "decode_num_workers": "1.0"}
    file = written(tmp_path / "points.csv", [*map(row, POINTS), row(POINTS[0]), apart, counted])
    points = silicon.read(file)
    assert (len(points.co_located), points.repeated, points.skipped) == (len(POINTS), 1, 1)
    (disaggregated,) = points.disaggregated
    assert disaggregated.concurrency == 8
    assert predict(points=file, json=tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["points"] == len(POINTS)
    assert found["tpot_ape_median"] < 0.01
    assert (found["repeated"], found["skipped"], found["disaggregated"]["points"]) == (1, 1, 1)


def test_a_wrong_file_is_refused_with_its_line_or_column(tmp_path: Path) -> None:
    with pytest.raises(BadSilicon, match="no column tp_size"):
        silicon.read(written(tmp_path / "a.csv", [], tuple(name for name in COLUMNS + MORE if name != "tp_size")))
    with pytest.raises(BadSilicon, match="line 3: silicon_tpot_ms 'fast' is no number above 0"):
        silicon.read(written(tmp_path / "b.csv", [row(POINTS[0]), row(POINTS[1], silicon_tpot_ms="fast")]))
    with pytest.raises(BadSilicon, match="has no point"):
        silicon.read(written(tmp_path / "c.csv", []))
    with pytest.raises(BadSilicon, match="cannot be read"):
        silicon.read(tmp_path / "none.csv")


def test_a_plan_takes_the_step_times_of_one_named_shape_and_says_how_far_they_are_off(tmp_path: Path) -> None:
    other = [row(each, model_path="zebra") for each in POINTS]
    file = written(tmp_path / "points.csv", [*map(row, POINTS), *other])
    with pytest.raises(BadSilicon, match="names 2 of the shapes"):
        silicon.read_shape(file, "vllm, fp8")
    with pytest.raises(BadSilicon, match="names none of the shapes"):
        silicon.read_shape(file, "gpu")
    shape, points = silicon.read_shape(file, "zebra, tp_size 2")
    model, told = serving_law.with_steps(cluster_model(), shape, points)
    assert model.step.fixed_s == pytest.approx(LAW.fixed_s, rel=0.1)
    assert model.name == str(shape)
    assert any("median error 0." in line for line in told)
    with pytest.raises(BadSilicon, match="has 3 points; 4 are needed"):
        serving_law.with_steps(cluster_model(), shape, points[:3])
