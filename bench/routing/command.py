"""The command ``python -m bench routing``."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from bench.policies.catalogue import PEERS
from bench.routing import plot as plotting
from bench.routing import table
from bench.routing.runs import ALL_POLICIES, Runs, Setup
from simulation.replay import traces
from simulation.replay.report import Slo

DEFAULT_PROFILE = Path(__file__).parent.parent / "cluster_model.json"


def compare(
    *,
    trace: Path,
    format: traces.Format | None = None,  # noqa: A002
    prefill: int = 4,
    decode: int = 4,
    loads: str = "0.5,0.8,1.0,1.2",
    seeds: int = 5,
    slo: str = "",
    policies: str = "",
    profile: Path = DEFAULT_PROFILE,
    json: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Replay a trace under the routing policies of other systems and ours, on one model of a cluster.

    Load 1.0 is the highest rate at which the best of the others' policies keeps 90 % of requests within the SLO. Tables
    go to stdout, progress to stderr.

    Parameters
    ----------
    trace
        a trace file; may be compressed with zstd
    format
        mooncake, azure or baton; default: by the file's contents
    loads
        separated by commas
    seeds
        runs of each policy at each load
    slo
        ttft=SECONDS,itl=SECONDS; default: ttft the larger of 2 s and 4 times the idle prefill, itl=0.05
    policies
        separated by commas; default: all. Load 1.0 is found with the others' among them.
    profile
        a cluster model; default: Qwen3-32B on four H100 a worker
    json
        where the rows go
    plot
        where a PNG goes
    """
    chosen = [name for name in policies.split(",") if name] or list(ALL_POLICIES)
    if unknown := sorted(set(chosen) - set(ALL_POLICIES)):
        raise ValueError(f"policies: there is no {', '.join(unknown)}; there are {', '.join(ALL_POLICIES)}")
    peers = [name for name in chosen if name in PEERS]
    if not peers:
        raise ValueError("policies: none of them is a peer's, and load 1.0 is found with those")
    if min(seeds, prefill, decode) < 1:
        raise ValueError("seeds, prefill and decode must be at least 1")
    at_loads = _loads(loads)
    setup = Setup(trace=trace, trace_format=format, profile=profile, prefill=prefill, decode=decode, slo=Slo.parse(slo))
    with Runs(setup) as runs:
        speed = runs.speed_at_load_one(peers, seeds)
        measured = runs.sweep(chosen, at_loads, seeds, speed)
    print(f"{trace.name} on {prefill}P{decode}D: load 1.0 is {speed:.3f} times the trace's rate; {seeds} seeds\n")
    print(table.text(measured, at_loads))
    rows = [one.row for one in measured]
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode({"rows": rows}), indent=2) + b"\n")
    if plot is not None:
        plotting.save(rows, f"{trace.name}, {prefill}P{decode}D", plot)
    print(f"{len(rows)} runs", file=sys.stderr)
    return 0


def _loads(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < load < float("inf") for load in found):
        raise ValueError(f"loads: {text!r} is not a list of numbers above 0, separated by commas")
    return found
