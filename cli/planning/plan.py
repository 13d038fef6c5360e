"""`baton plan`: replays a workload on every split of some workers, and recommends one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cli.planning.simulate import BadOption, TraceFormat, check_counts, played

if TYPE_CHECKING:
    from simulation.replay.cluster_model import ClusterModel
    from simulation.replay.traces import Trace

WORKERS_MAX = 1024
"""Of the search for the fewest workers that serve a rate."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is replayed."""

    trace: str = ""
    """file, compressed if its name ends in .zst"""
    workload: str = ""
    """instead of a file, traffic to make: multi-turn, shared-prompt, agents, reasoning or summarisation"""
    format: TraceFormat | None = None
    """format of the file (default: its first line tells)"""
    requests: int = 3000
    """number of requests to make, one a second on average"""

    @property
    def name(self) -> str:
        """The file's, or that of made traffic."""
        return self.trace or self.workload

    def read(self) -> Trace:
        """What a file holds, or made traffic. Raises BadOption."""
        if bool(self.trace) == bool(self.workload):
            raise BadOption("give one of --trace and --workload")
        check_counts(("requests", self.requests, 1))
        return played(self.name, self.format, self.requests)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a worker is."""

    profile: Path | None = None
    """what `baton profile` wrote, or a cluster model (default: bench/cluster_model.json of the installation)"""
    silicon: Path | None = None
    """CSV with AIConfigurator's columns: the step times are fitted to it, the rest is the profile's"""
    shape: str = ""
    """words that name one engine shape of that file, as in "Qwen3-32B h100 tp_size 4\""""

    def read(self) -> tuple[ClusterModel, list[str]]:
        """The model of a worker, and in words where its times come from."""
        import bench
        from simulation.sizing import profile_fit, serving_law
        from simulation.sizing.silicon import read_shape

        model = profile_fit.read_model(self.profile or Path(bench.__file__).parent / "cluster_model.json")
        if self.silicon is None:
            return model, [f"profile: {model.name}"]
        return serving_law.with_steps(model, *read_shape(self.silicon, self.shape))


def _workers(workers: int, gpus: int, gpus_per_worker: int, rate: float) -> int:
    """How many there may be."""
    if (workers and gpus) or not (workers or gpus or rate) or not 0 <= rate < float("inf"):
        raise BadOption("give --workers or --gpus or --rate, above 0, and not the first two together")
    check_counts(("gpus-per-worker", gpus_per_worker, 1))
    count = workers or gpus // gpus_per_worker if workers or gpus else WORKERS_MAX
    check_counts(("workers", count, 1))
    return count


_TRAFFIC, _SPEED = Traffic(), Speed()


def plan(
    *,
    traffic: Traffic = _TRAFFIC,
    speed: Speed = _SPEED,
    workers: int = 0,
    gpus: int = 0,
    gpus_per_worker: int = 1,
    rate: float = 0.0,
    slo: str = "",
    attainment: float = 0.9,
    seeds: int = 3,
    quick: bool = False,
    processes: int = 0,
    json: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    html: Annotated[Path | None, Parameter(metavar="FILE")] = None,
) -> None:
    """Recommend how many prefill and how many decode workers, by replays in virtual time.

    The table is on stdout, progress on stderr. The same options give the same bytes.

    Parameters
    ----------
    workers
        number of workers to split; with --rate alone: as few as keep the SLO
    gpus
        instead of --workers
    rate
        requests a second (default: those of the trace)
    slo
        ttft=2,itl=0.05 for --attainment of the requests, or ttft_p99=2,itl_p99=0.05 (default: as in `baton simulate`)
    attainment
        share of the requests that must keep bounds without a percentile
    seeds
        replays of each split
    quick
        do not look for the highest rates of the best splits
    processes
        default: the number of cores
    json
        where the answer goes
    html
        where a report with pictures goes
    """
    import msgspec

    from simulation.sizing import answer, html_report, search
    from simulation.sizing.objective import Objective
    from simulation.sizing.trial import Trials, Workload

    count = _workers(workers, gpus, gpus_per_worker, rate)
    check_counts(("seeds", seeds, 1))
    objective = Objective.parse(slo, attainment)
    model, facts = speed.read()
    load = Workload(trace=traffic.read(), model=model, objective=objective)
    asked = search.Sizing(
        workers=count,
        rate_rps=rate or load.trace.rate_rps,
        seeds=seeds,
        gpus_per_worker=gpus_per_worker,
        bisects=not quick,
    )
    find = search.plan if workers or gpus else search.smallest
    with Trials(load, processes) as trials:
        found = find(trials, asked, lambda line: print(line, file=sys.stderr, flush=True))
    facts = [f"{len(load.trace.arrivals)} requests of {Path(traffic.name).name}", *facts]
    print("\n".join([*facts, "", answer.as_table(found)]))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    if html is not None:
        html.write_text(html_report.page(found, f"{found.workers} workers for {Path(traffic.name).name}", facts))
