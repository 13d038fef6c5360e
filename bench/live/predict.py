"""The command predict: a profile from one split of a cluster, and what it predicts of the others, beside real runs."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
from cyclopts import Parameter

from bench import bench_model, report
from bench.live import client, cluster, fidelity, recording
from bench.live.cluster import MODEL_NAME, Cluster, Shape
from bench.live.fidelity import Kind, Load
from bench.live.figures import ITL_SLO_S, TTFT_SLO_S, Error, Figures, errors, of_outcomes, of_records
from bench.live.workload import Lengths, made, prompts_of
from launcher.demo import model as demo_model
from runtime.user_error import UserError
from simulation.replay.cluster_model import ClusterModel
from simulation.replay.report import Outcome, Slo
from simulation.replay.traces import Arrival, Trace
from simulation.sizing import closed_form
from simulation.sizing.closed_form import Split
from simulation.sizing.objective import Objective

OBJECTIVE = Objective(slo=Slo(ttft_s=TTFT_SLO_S, itl_s=ITL_SLO_S), targets={"all": 0.9})
"""Of the ratio law, which says how much load a split gets."""
_ASKED = {"ttft_slo_ms": 1e3 * TTFT_SLO_S, "tpot_slo_ms": 1e3 * ITL_SLO_S}
"""By every request."""
PAUSE_S = 5.0
"""Between two runs, in the simulator."""
# Neither is that of the calibration.
WORKLOADS: Mapping[Kind, Mapping[str, Lengths]] = {
    "fake": {
        "prompts": Lengths(prompt_tokens=500, output_tokens=12),
        "outputs": Lengths(prompt_tokens=150, output_tokens=60),
    },
    "vllm": {
        "prompts": Lengths(prompt_tokens=320, output_tokens=8),
        "outputs": Lengths(prompt_tokens=100, output_tokens=40),
    },
}


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSpec:
    """How much is measured."""

    kind: Kind = "fake"
    """fake engines, paced, behind the real processes; or vLLM's, with a core each"""
    workers: int = 6
    splits: Sequence[int] = ()
    """prefill workers of each split that is measured; default: all"""
    requests: int = 1000
    repeats: int = 3
    load: float = 0.6
    """share of what each split could serve by the ratio law"""
    cores_an_engine: float = 0.0
    """share of CPU that is each worker's alone, by a cgroup, in the profile as well; 0: one core each for vLLM's"""
    seed: int = 1


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """One workload on one split. ``whole_*``: share of the requests that a decode worker ran whole."""

    split: Split
    workload: str
    per_s: float
    errors: Sequence[Error]
    whole_real: float
    whole_simulated: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One repeat of one workload."""

    workload: str
    per_s: float
    trace: Trace
    seed: int


def predict(*, json: Path | None = None, spec: PredictSpec = PredictSpec(), logs_dir: Path | None = None) -> int:
    """Profile one split, predict all, run all, and say how far each prediction was.

    Throughput, goodput, ITL and TTFT (mean, p50, p90, p99) of two workloads that the profile was not made of. The exit
    code says whether every one that has a bound is within it.

    Parameters
    ----------
    json
        where the numbers go
    logs_dir
        default: a new folder
    """
    if spec.workers < 2 or not all(0 <= prefill < spec.workers for prefill in spec.splits):
        raise UserError("workers: at least 2, and each split leaves a decode worker")
    folder = logs_dir or Path(tempfile.mkdtemp(prefix="baton-predict-"))
    splits = [Split(prefill=p, decode=spec.workers - p) for p in spec.splits or range(spec.workers)]
    model, found = asyncio.run(_all(spec, splits, folder))
    print(as_table(found))
    print(f"logs: {folder}")
    if json is not None:
        told = {"machine": report.environment(), "spec": spec, "found": found, "model": model}
        json.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")
    return 0 if all(error.within for each in found for error in each.errors) else 1


def as_table(found: Sequence[Predicted]) -> str:
    """In Markdown."""
    lines = ["| split | workload | requests/s | measure | measured | predicted | error | spread | bound | within |"]
    lines.append("|" + " --- |" * 10)
    for one in found:
        lines += [
            f"| {one.split} | {one.workload} | {one.per_s:.2f} | {each.measure} | {each.real:.5g} | "
            f"{each.simulated:.5g} | {each.error:+.1%} | {each.spread:.1%} | {each.verdict} |"
            for each in one.errors
        ]
        whole = f"{one.whole_real:.3g} | {one.whole_simulated:.3g}"
        lines.append(f"| {one.split} | {one.workload} | {one.per_s:.2f} | whole | {whole} | | | | |")
    return "\n".join(lines)


async def _all(spec: PredictSpec, splits: Sequence[Split], folder: Path) -> tuple[ClusterModel, list[Predicted]]:
    middle = max(1, spec.workers // 2)
    model = await _profiled(spec, _shape(spec, Split(prefill=middle, decode=spec.workers - middle)), folder)
    found = []
    for split in splits:
        shape, logs = _shape(spec, split), folder / str(split).replace(" ", "-")
        logs.mkdir(parents=True, exist_ok=True)
        async with _running(spec, shape, logs) as running:
            await fidelity.send_alone(running, fidelity.WARM_REQUESTS * spec.workers, spec.seed)
            found += await _compared(spec, running, split, model)
    return model, found


def _running(spec: PredictSpec, shape: Shape, logs: Path) -> AbstractAsyncContextManager[Cluster]:
    pins = spec.kind == "vllm" and not spec.cores_an_engine
    return cluster.running(shape, logs, pin_engines=pins, cores_an_engine=spec.cores_an_engine)


async def _profiled(spec: PredictSpec, shape: Shape, folder: Path) -> ClusterModel:
    """The profile of this machine, as `bench fidelity` calibrates it."""
    logs = folder / "profile"
    logs.mkdir(parents=True, exist_ok=True)
    async with _running(spec, shape, logs) as running:
        alone = await fidelity.calibrated_alone(running, spec.seed)
        first = fidelity.fit_of(spec.kind, alone, alone.observed)
        per_s = fidelity.rate(first.model, fidelity.CALIBRATION[spec.kind], shape.prefill, spec.load)
        load = Load(requests=fidelity.CALIBRATION_REQUESTS, per_s=per_s, seed=spec.seed)
        return fidelity.fit_of(spec.kind, alone, await fidelity.calibration(running, spec.kind, load)).model


async def _compared(spec: PredictSpec, running: Cluster, split: Split, model: ClusterModel) -> list[Predicted]:
    """Each workload: the same arrivals in every repeat, of other tokens."""
    runs = [run for name, lengths in WORKLOADS[spec.kind].items() for run in _runs(spec, split, model, name, lengths)]
    real: list[Figures] = []
    whole: list[float] = []
    for run in runs:
        since_s = recording.last_s(running.recording)
        prompts = [msgspec.structs.replace(each, **_ASKED) for each in prompts_of(run.trace, run.seed)]
        real.append(of_records(await client.run(running.grpc_address, MODEL_NAME, prompts)))
        whole.append(fidelity.whole_share(running.recording, since_s))
        fidelity.say(f"{split} {run.workload}: {run.per_s:.2f} requests/s, mean TTFT {real[-1].ttft_mean_s:.4f} s")
    simulated = _simulated(spec, model, runs, running.shape)
    found = []
    for name in WORKLOADS[spec.kind]:
        of = [index for index, run in enumerate(runs) if run.workload == name]
        found.append(
            Predicted(
                split=split,
                workload=name,
                per_s=runs[of[0]].per_s,
                errors=errors([real[i] for i in of], [of_outcomes(simulated[i]) for i in of]),
                whole_real=statistics.fmean(whole[i] for i in of),
                whole_simulated=statistics.fmean(each.whole for i in of for each in simulated[i]),
            )
        )
    return found


def _runs(spec: PredictSpec, split: Split, model: ClusterModel, name: str, lengths: Lengths) -> list[Run]:
    asked = closed_form.demand(_trace(lengths, model, 1000, 1.0, spec.seed), model, OBJECTIVE, caches=1)
    per_s = spec.load * closed_form.capacity_rps(split, asked, model, OBJECTIVE)
    trace = _trace(lengths, model, spec.requests, per_s, spec.seed)
    seeds = [fidelity.hash_of(spec.seed, f"{name} {index}") for index in range(spec.repeats)]
    return [Run(workload=name, per_s=per_s, trace=trace, seed=seed) for seed in seeds]


def _simulated(spec: PredictSpec, model: ClusterModel, runs: Sequence[Run], shape: Shape) -> list[Sequence[Outcome]]:
    """One run after the other under one scheduler, behind the requests that warmed the cluster up.

    A scheduler learns from what it serves: a fresh one in each run would decide otherwise than the real one.
    """
    warm = made(fidelity.ALONE, fidelity.WARM_REQUESTS * spec.workers, 1.0, spec.seed, model.block_size_tokens)
    arrivals: list[Arrival] = []
    begins = []
    for trace in (warm, *(run.trace for run in runs)):
        after_s = arrivals[-1].arrived_s + PAUSE_S if arrivals else 0.0
        begins.append(len(arrivals))
        arrivals += [msgspec.structs.replace(each, arrived_s=after_s + each.arrived_s) for each in trace.arrivals]
    whole = msgspec.structs.replace(warm, arrivals=arrivals)
    outcomes = fidelity.simulated(model, whole, shape, spec.seed, OBJECTIVE.slo).outcomes
    return [outcomes[begin:end] for begin, end in itertools.pairwise([*begins[1:], len(outcomes)])]


def _trace(lengths: Lengths, model: ClusterModel, requests: int, per_s: float, seed: int) -> Trace:
    return made(lengths, requests, per_s, fidelity.hash_of(seed, "predict"), model.block_size_tokens)


def _shape(spec: PredictSpec, split: Split) -> Shape:
    demo = demo_model.ensure(demo_model.default_cache_dir(os.environ))
    fake = spec.kind == "fake"
    model = demo if fake else bench_model.ensure(demo_model.default_cache_dir(os.environ), demo)
    settings = fidelity.COMMON | (fidelity.FAKE if fake else fidelity.VLLM)
    return Shape(prefill=split.prefill, decode=split.decode, settings=settings, model=model, seed=spec.seed)
