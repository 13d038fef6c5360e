"""Turns visits into rows, ratios, bounds, JSON and a table. Measures nothing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bench.front_door.measure import FrontDoorSpec, Visit
from bench.front_door.systems import SYSTEM_NAMES, SystemName

MEASURES = ("cpu_us_per_token", "cpu_ms_per_request", "burst64_ttft_mean_ms")
# Chunks that carry more or less than one token make a token look cheaper or dearer than it is.
_TOKENS_PER_CHUNK_SLACK = 0.02


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """What a median may be at most: a ratio where ``over`` names a system, else the measure itself."""

    measure: str
    system: SystemName
    over: SystemName | None = None
    at_most: float


BOUNDS = (
    Bound(measure="cpu_us_per_token", system="baton", over="dynamo", at_most=0.8),
    Bound(measure="cpu_ms_per_request", system="baton", over="dynamo", at_most=1.0),
    Bound(measure="cpu_ms_per_request_64_in_flight", system="baton_grpc", at_most=0.5),
    Bound(measure="cpu_us_per_token_64_in_flight", system="baton_grpc", at_most=5.0),
    Bound(measure="burst64_ttft_mean_ms", system="baton", over="earlier", at_most=1 / 3),
)
_RATIOS: tuple[tuple[SystemName, SystemName], ...] = (
    ("baton", "dynamo"), ("baton", "vllm_router"), ("baton", "earlier"),
)  # fmt: skip


def row(visits: Sequence[Visit]) -> dict[str, Any]:
    """One system: the median of each measure over its rounds, and its lowest and highest."""
    values = {name: [visit.values[name] for visit in visits] for name in visits[0].values}
    return {
        "system": visits[0].system,
        **{name: statistics.median(seen) for name, seen in values.items()},
        "spread": {name: [min(seen), max(seen)] for name, seen in values.items()},
        "tokens_per_chunk": statistics.median(visit.tokens_per_chunk for visit in visits),
        "failed": sum(len(visit.errors) for visit in visits),
        "rounds": values,
    }


def rows(visits: Sequence[Visit]) -> list[dict[str, Any]]:
    """One row for each system that ran."""
    by_system = {name: [visit for visit in visits if visit.system == name] for name in SYSTEM_NAMES}
    return [row(seen) for seen in by_system.values() if seen]


def ratios(visits: Sequence[Visit], measure: str, system: SystemName, over: SystemName) -> list[float]:
    """The ratio within each round that has both."""
    of: dict[tuple[SystemName, int], float] = {
        (visit.system, visit.round): visit.values[measure] for visit in visits if measure in visit.values
    }
    found = [(value, of.get((over, index))) for (name, index), value in of.items() if name == system]
    return [value / below for value, below in found if below]


def judged(visits: Sequence[Visit]) -> list[dict[str, Any]]:
    """Each bound with what was found, None where it was not measured."""
    lines = []
    for bound in BOUNDS:
        if bound.over is not None:
            found = ratios(visits, bound.measure, bound.system, bound.over)
        else:
            found = [visit.values[bound.measure] for visit in visits if visit.system == bound.system]
        lines.append({**msgspec.to_builtins(bound), "found": statistics.median(found) if found else None})
    return lines


def build(
    spec: FrontDoorSpec, visits: Sequence[Visit], machine: Mapping[str, Any], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that was done and seen, as one JSON value."""
    compared = {}
    for system, over in _RATIOS:
        for measure in MEASURES:
            if found := ratios(visits, measure, system, over):
                compared[f"{measure}: {system} / {over}"] = found
    return {
        "rows": rows(visits),
        "ratios": compared,
        "bounds": judged(visits),
        "left_out": dict(left_out),
        "errors": [f"{one.system} round {one.round + 1}: {error[:300]}" for one in visits for error in one.errors[:3]],
        "spec": msgspec.to_builtins(spec),
        "environment": {**machine, "load_average_after": os.getloadavg()},
    }


def text(report: Mapping[str, Any]) -> str:
    """The table that people read first."""
    machine, spec = report["environment"], report["spec"]
    lines = [
        (
            f"{machine['cores']} cores, {machine['processor']}, Python {machine['python']}; load average "
            f"{machine['load_average_before'][0]:.1f} before and {machine['load_average_after'][0]:.1f} after"
        ),
        (
            f"CPU of the front end's process alone; {spec['in_flight']} requests in flight, "
            f"{spec['prompt_tokens']}-token prompts, {spec['step_ms']:g} ms steps, {spec['rounds']} rounds; "
            "medians over rounds (range)"
        ),
        "",
        (
            f"{'system':<24}{'us a token':>22}{'ms a request':>22}{'burst TTFT ms':>24}"
            f"{'tok/s/core':>12}{'req/s/core':>12}{'idle ms/s':>11}{'tok/chunk':>11}{'failed':>8}"
        ),
    ]
    for one in report["rows"]:
        lines.append(
            f"{one['system']:<24}{_range(one, 'cpu_us_per_token', 1):>22}{_range(one, 'cpu_ms_per_request', 2):>22}"
            f"{_range(one, 'burst64_ttft_mean_ms', 1):>24}{one['tokens_per_core_s']:>12,.0f}"
            f"{one['requests_per_core_s']:>12,.0f}{one['idle_cpu_ms_per_s']:>11.1f}{one['tokens_per_chunk']:>11.3f}{one['failed']:>8}"
        )
        for suffix in ("64_in_flight", "alone"):
            if f"cpu_us_per_token_{suffix}" in one:
                name = f"  {suffix.replace('_', ' ')}"
                token, request = (_range(one, f"{of}_{suffix}", 2) for of in ("cpu_us_per_token", "cpu_ms_per_request"))
                lines.append(f"{name:<24}{token:>22}{request:>22}")
    lines += ["", f"{'ratio':<52} {'median':>8} {'lowest':>8} {'highest':>8}"]
    for name, found in report["ratios"].items():
        lines.append(f"{name:<52} {statistics.median(found):>8.3f} {min(found):>8.3f} {max(found):>8.3f}")
    lines.append("")
    lines += [_verdict(bound) for bound in report["bounds"]]
    for one in report["rows"]:
        if abs(one["tokens_per_chunk"] - 1.0) > _TOKENS_PER_CHUNK_SLACK:
            lines.append(
                f"{one['system']}: {one['tokens_per_chunk']:.3f} tokens a chunk, not one: CPU a token misleads"
            )
    lines += [f"{name}: left out: {why}" for name, why in report["left_out"].items()]
    return "\n".join([*lines, *report["errors"]])


def _verdict(bound: Mapping[str, Any]) -> str:
    over = f" / {bound['over']}" if bound["over"] else ""
    name = f"{bound['measure']}: {bound['system']}{over} at most {bound['at_most']:.3g}"
    found = bound["found"]
    if found is None:
        return f"{name}: not measured"
    return f"{name}: {'kept' if found <= bound['at_most'] else 'MISSED'} ({found:.3f})"


def _range(one: Mapping[str, Any], measure: str, digits: int) -> str:
    low, high = one["spread"][measure]
    return f"{one[measure]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
