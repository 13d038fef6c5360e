"""The command ``python -m bench silicon``: how well the laws of the planner predict measured serving points."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from simulation.replay.report import quantile
from simulation.sizing import serving_law, silicon
from simulation.sizing.serving_law import Errors, ServingLaw
from simulation.sizing.silicon import Point, Shape

FLAGGED = 0.1
"""Shapes with a larger median error are named."""


def predict(*, points: Path, json: Path | None = None) -> int:
    """Predict each measured point from the others of its engine shape, and say by how much it was missed.

    Of repeated measurements the medians are one point. Shapes with fewer than 4 points are left out. Disaggregated
    points are predicted from the co-located ones of their model and system. Errors are shares of what was measured.

    Parameters
    ----------
    points
        a CSV with the columns of AIConfigurator's silicon sample; may be compressed with zstd
    json
        where the figures go
    """
    told = silicon.read(points)
    groups = silicon.by_shape(told.co_located)
    large = {shape: group for shape, group in groups.items() if len(group) >= serving_law.POINTS_MIN}
    by_shape = {shape: serving_law.left_out(group) for shape, group in large.items()}
    errors = list(itertools.chain.from_iterable(by_shape.values()))
    flagged = {str(shape): figures(each) for shape, each in by_shape.items() if _median(each) > FLAGGED}
    laws = {shape: serving_law.fit(group) for shape, group in large.items()}
    apart = _disaggregated(told.disaggregated, laws)
    found: dict[str, Any] = {
        **figures(errors),
        "inner": figures(each for each in errors if each.inner),
        "ends": figures(each for each in errors if not each.inner),
        "disaggregated": figures(apart),
        "repeated": told.repeated,
        "skipped": told.skipped,
        "in_small_groups": len(told.co_located) - len(errors),
        "without_co_located": len(told.disaggregated) - len(apart),
        "flagged": flagged,
    }
    print(_table(found))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return 0


def figures(errors: Iterable[Errors]) -> dict[str, float]:
    """Medians and 90th percentiles."""
    every = list(errors)
    found: dict[str, float] = {"points": len(every)}
    for name in ("tpot", "ttft"):
        sizes = sorted(getattr(each, name) for each in every)
        found |= {f"{name}_ape_median": quantile(sizes, 0.5), f"{name}_ape_p90": quantile(sizes, 0.9)}
    return found


def _median(errors: Sequence[Errors]) -> float:
    found = figures(errors)
    return max(found["tpot_ape_median"], found["ttft_ape_median"])


def _disaggregated(points: Sequence[Point], laws: Mapping[Shape, ServingLaw]) -> list[Errors]:
    """Only points whose model was measured co-located on their system."""
    errors = []
    for point in points:
        assert point.pools is not None
        prefill = _nearest(point, point.pools.prefill_tensor_parallel, laws)
        decode = _nearest(point, point.pools.decode_tensor_parallel, laws)
        if prefill is None or decode is None:
            continue
        ttft_s, tpot_s = serving_law.disaggregated(prefill, decode, point)
        ttft, tpot = abs(ttft_s / point.ttft_s - 1.0), abs(tpot_s / point.tpot_s - 1.0)
        errors.append(Errors(point=point, ttft=ttft, tpot=tpot, inner=False))
    return errors


def _nearest(point: Point, tensor_parallel: int, laws: Mapping[Shape, ServingLaw]) -> ServingLaw | None:
    """Of this model and system, the law of the same precision and of as many GPUs, where there is one."""
    shapes = [each for each in laws if (each.model, each.system) == (point.shape.model, point.shape.system)]
    if not shapes:
        return None

    def far(shape: Shape) -> tuple[bool, bool, float]:
        ratio = shape.tensor_parallel / tensor_parallel
        same = shape.backend == point.shape.backend, shape.precision == point.shape.precision
        return not same[1], not same[0], max(ratio, 1.0 / ratio)

    return laws[min(shapes, key=far)]


def _table(found: Mapping[str, Any]) -> str:
    lines = [f"{'error, share of measured':<28}{'points':>8}{'TPOT p50':>10}{'p90':>8}{'TTFT p50':>10}{'p90':>8}"]
    rows = [("all, each left out", found), *((name, found[name]) for name in _PARTS)]
    for name, row in [each for each in rows if each[1]["points"]]:
        shares = "".join(f"{row[key]:>{width}.1%}" for key, width in _COLUMNS.items())
        lines.append(f"{name:<28}{row['points']:>8}{shares}")
    left_out = (
        f"{found['skipped']} disaggregated rows without counts of workers, {found['without_co_located']} without a "
        f"co-located shape, {found['in_small_groups']} in small groups"
    )
    lines.append(f"{found['repeated']} repeated rows were merged; left out: {left_out}")
    lines += [f"median above {FLAGGED:.0%}: {shape}" for shape in found["flagged"]]
    return "\n".join(lines)


_PARTS = ("inner", "ends", "disaggregated")
_COLUMNS = {"tpot_ape_median": 10, "tpot_ape_p90": 8, "ttft_ape_median": 10, "ttft_ape_p90": 8}
