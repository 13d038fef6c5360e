"""The command ``python -m bench regret``: what a split recommended from the first half of a trace loses later on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

import bench
from simulation.replay import generators, traces
from simulation.replay.traces import Trace
from simulation.sizing import closed_form, profile_fit, search
from simulation.sizing.closed_form import Demand, Split
from simulation.sizing.objective import Objective
from simulation.sizing.search import Sizing
from simulation.sizing.trial import Job, Trials, Workload

SAMPLE_REQUESTS = 3000
HIGHER = 1.2
"""The highest rate of a split is seldom more than the law's times this."""


class Regret(msgspec.Struct, frozen=True, kw_only=True):
    """At one rate. ``regret``: the share of the best split's goodput that the recommended one lacks, second half."""

    rate_rps: float
    recommended: Split
    best: Split
    goodput_rps: float
    best_goodput_rps: float
    regret: float


def regret(
    *,
    trace: str,
    workers: int = 16,
    loads: str = "0.6,0.8,1.0",
    requests: int = 0,
    slo: str = "",
    profile: Path | None = None,
    processes: int = 0,
    json: Path | None = None,
) -> int:
    """Recommend a split from the first half of a trace at three rates, and replay the second half on every split.

    Load 1.0 is the highest rate that the best split keeps on the first half.

    Parameters
    ----------
    trace
        a file, or traffic to make, as in `baton plan`
    loads
        separated by commas
    requests
        of made traffic (default: as many as fill the cluster up in each half, 3,000 at least)
    slo
        as in `baton plan`
    profile
        as in `baton plan`
    processes
        default: the number of cores
    json
        where the numbers go
    """
    model = profile_fit.read_model(profile or Path(bench.__file__).parent / "cluster_model.json")
    objective = Objective.parse(slo)
    if trace in generators.SHAPES:
        sample = Workload(
            trace=generators.made(trace, requests or SAMPLE_REQUESTS, 1.0, 0), model=model, objective=objective
        )
        whole = _made(trace, sample, workers, requests)
    else:
        whole = traces.read(Path(trace))
    first, second = (Workload(trace=half, model=model, objective=objective) for half in _halves(whole))
    with Trials(first, processes) as trials:
        found = _recommended(trials, first, workers, [float(load) for load in loads.split(",")])
    rows = []
    with Trials(second, processes) as trials:
        for rate_rps, split in found:
            jobs = [Job(split=each, rate_rps=rate_rps, seed=1) for each in closed_form.all_splits(workers)]
            goodputs = {trial.job.split: trial.goodput_rps for trial in trials.run(jobs)}
            best = max(goodputs, key=lambda each: goodputs[each])
            rows.append(
                Regret(
                    rate_rps=rate_rps,
                    recommended=split,
                    best=best,
                    goodput_rps=goodputs[split],
                    best_goodput_rps=goodputs[best],
                    regret=1.0 - goodputs[split] / goodputs[best],
                )
            )
            row = rows[-1]
            print(
                f"{Path(trace).name}, {rate_rps:.2f} requests/s: recommended {split} ({row.goodput_rps:.3f}), "
                f"best {best} ({row.best_goodput_rps:.3f}), regret {row.regret:.1%}",
                flush=True,
            )
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")
    return 0


def _recommended(trials: Trials, first: Workload, workers: int, loads: Sequence[float]) -> list[tuple[float, Split]]:
    """The rate of each load, and the split that is recommended for it."""
    _, law_rps = _law(first, workers)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    at_law = search.plan(trials, Sizing(workers=workers, rate_rps=law_rps, seeds=1), say)
    highest_rps = at_law.best_row.highest_rps or law_rps
    return [
        (
            load * highest_rps,
            search.plan(trials, Sizing(workers=workers, rate_rps=load * highest_rps, seeds=1), say).best,
        )
        for load in loads
    ]


def _law(load: Workload, workers: int) -> tuple[Demand, float]:
    """What is asked for, and the ratio law's rate of the best split."""
    needed = closed_form.demand(load.trace, load.model, load.objective, caches=workers)
    splits = closed_form.all_splits(workers)
    return needed, max(closed_form.capacity_rps(split, needed, load.model, load.objective) for split in splits)


def _made(kind: str, sample: Workload, workers: int, requests: int) -> Trace:
    """At about the rate at which it is played, so that turns of a session come when they would."""
    needed, law_rps = _law(sample, workers)
    enough = 2 * closed_form.filling(needed, sample.objective, HIGHER * law_rps)
    return generators.made(kind, requests or max(SAMPLE_REQUESTS, enough), law_rps, 0)


def _halves(whole: Trace) -> list[Trace]:
    middle = len(whole.arrivals) // 2
    return [
        msgspec.structs.replace(whole, arrivals=part) for part in (whole.arrivals[:middle], whole.arrivals[middle:])
    ]
