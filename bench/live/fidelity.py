"""The command fidelity: the same load on a real cluster and in the simulator, and how far their figures differ."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from cyclopts import Parameter

from bench import bench_model, report
from bench.live import client, cluster, recording
from bench.live.calibration import Engine, Fit, fitted
from bench.live.cluster import MODEL_NAME, Cluster, Shape
from bench.live.figures import Error, Figures, errors, of_outcomes, of_records
from bench.live.planners import ROUND_ROBIN
from bench.live.workload import Lengths, made, prompts_of
from bench.measures import RequestRecord
from launcher.demo import model as demo_model
from runtime.roles import WORKER_ROLES, WorkerRole
from scheduler.api.events import WorkerJoined, WorkerProgressReported
from scheduler.api.worker_info import WorkerInfo
from scheduler.api.worker_progress import EngineStep
from simulation.replay.baton_policy import Baton
from simulation.replay.cluster_model import ClusterModel
from simulation.replay.report import Slo
from simulation.replay.run import Replay, Scenario
from simulation.replay.traces import Trace

Kind = Literal["fake", "vllm"]
WARM_REQUESTS = 10
ALONE_REQUESTS = 60
FIRST_REQUESTS = 100
CALIBRATION_REQUESTS = 400
ALONE = Lengths(prompt_tokens=400, output_tokens=2, output_tokens_max=2)
# Of each kind of engine: of the calibration, and of what is measured. Real engines on neighbouring cores slow one
# another: their calibration gives about as many tokens a second as what is measured.
CALIBRATION: Mapping[Kind, Lengths] = {
    "fake": Lengths(prompt_tokens=300, output_tokens=32),
    "vllm": Lengths(prompt_tokens=250, output_tokens=20),
}
MEASURED: Mapping[Kind, Lengths] = {
    "fake": Lengths(prompt_tokens=400, output_tokens=24),
    "vllm": Lengths(prompt_tokens=200, output_tokens=16),
}
NO_SLO = Slo(ttft_s=0.0, itl_s=0.0)
_SEQUENCES_MAX = 64
COMMON = {
    "engine.max_model_len": 2048,
    "engine.max_num_seqs": _SEQUENCES_MAX,
    "engine.block_size_tokens": 32,
}
# Slow enough that messages and the fake engine's own work are small beside its steps, on two cores.
FAKE = {
    "engine.kind": "fake",
    "engine.fake.kv_blocks_total": 8192,
    "engine.fake.step_us": 10_000,
    "engine.fake.decode_step_us": 0,
    "engine.fake.decode_step_us_per_request": 200,
    "engine.fake.prefill_us_per_token": 100,
    "engine.fake.pull_us_per_block": 50,
}
_VLLM_BATCHED_TOKENS = 1024
VLLM = {
    "engine.dtype": "float32",
    "engine.cpu_threads": 1,
    "engine.kv_cache_bytes": 1 << 29,
    "engine.max_num_batched_tokens": _VLLM_BATCHED_TOKENS,
}
# A step of the fake engine computes every prompt that waits.
_ENGINES: dict[Kind, Engine] = {
    "fake": Engine(batched_tokens_max=1 << 20, sequences_max=_SEQUENCES_MAX),
    "vllm": Engine(batched_tokens_max=_VLLM_BATCHED_TOKENS, sequences_max=_SEQUENCES_MAX),
}


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelitySpec:
    """How much is measured."""

    clusters: Sequence[str] = ("fake:1P1D", "fake:2P2D", "fake:4P4D", "vllm:1P1D", "vllm:2P1D")
    """engine and shape of each cluster; bounds hold for all but vllm:2P1D"""
    requests: int = 1000
    repeats: int = 3
    load: float = 0.6
    """share of what the prefill workers could compute"""
    model: Literal["demo", "bench"] = "bench"
    """what vLLM runs: the demo model, or the benchmark's, whose steps take longer"""
    seed: int = 1


class Repeat(msgspec.Struct, frozen=True, kw_only=True):
    """What was fitted before it, and what both said. ``whole_*``: share of requests that a decode worker ran whole."""

    fit: Fit
    real: Figures
    simulated: Figures
    whole_real: float
    whole_simulated: float


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster."""

    cluster: str
    bounded: bool
    per_s: float
    repeats: Sequence[Repeat]
    errors: Sequence[Error]
    pinned: dict[str, int]

    @property
    def passed(self) -> bool:
        """Whether every measure is within its bound."""
        return not self.bounded or all(each.within for each in self.errors)


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording shows of a cluster."""

    # Any: all have one shape.
    worker: WorkerInfo
    steps: dict[WorkerRole, list[EngineStep]]


def observed(file: Path, since_s: float) -> Observed:
    """The workers, and their steps since then."""
    _, entries = recording.read(file)
    workers: dict[str, WorkerInfo] = {}
    steps: dict[WorkerRole, list[EngineStep]] = {"prefill": [], "decode": []}
    for entry in entries:
        match entry.event:
            case WorkerJoined(info=info):
                workers[info.worker_id] = info
            case WorkerProgressReported(worker_id=worker_id, steps=reported) if entry.now_s > since_s:
                steps[workers[worker_id].role].extend(reported)
            case _:
                pass
    return Observed(worker=next(iter(workers.values())), steps=steps)


def rate(model: ClusterModel, lengths: Lengths, prefill: int, load: float) -> float:
    """Requests a second that keep the prefill workers busy for this share of the time."""
    drawn = made(lengths, 1000, 1.0, 0, model.block_size_tokens)
    mean_s = statistics.fmean(model.idle_prefill_s(each.prompt_tokens) for each in drawn.arrivals)
    return load * prefill / mean_s


def simulated(model: ClusterModel, trace: Trace, shape: Shape, seed: int, slo: Slo = NO_SLO) -> Replay:
    """The load in the simulator, under the production scheduler. ``slo``: what requests ask for."""
    scenario = Scenario(trace=trace, model=model, prefill=shape.prefill, decode=shape.decode, seed=seed, slo=slo)
    replay = Replay(scenario, "baton", Baton)
    replay.run()
    return replay


def whole_share(file: Path, since_s: float) -> float:
    """Share of the plans since then that have no prefill worker."""
    _, entries = recording.read(file)
    plans = [decision for entry in entries if entry.now_s >= since_s for decision in entry.decisions if decision.decode]
    return sum(not each.prefill for each in plans) / len(plans) if plans else 0.0


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that had the cluster for themselves, and what the workers said meanwhile."""

    records: Sequence[RequestRecord]
    observed: Observed


async def calibrated_alone(running: Cluster, seed: int) -> Alone:
    """Warm up, then send one request after the other."""
    shape = running.shape
    await send_alone(running, WARM_REQUESTS * shape.prefill * shape.decode, hash_of(seed, "warm"))
    warmed_s = recording.last_s(running.recording)
    records = await send_alone(running, ALONE_REQUESTS, hash_of(seed, "alone"))
    return Alone(records=records, observed=observed(running.recording, warmed_s))


async def calibration(running: Cluster, kind: Kind, load: Load) -> Observed:
    """What the workers said of an open loop of other lengths than what is measured."""
    trace = made(CALIBRATION[kind], load.requests, load.per_s, load.seed, COMMON["engine.block_size_tokens"])
    began_s = recording.last_s(running.recording)
    whole(await client.run(running.grpc_address, MODEL_NAME, prompts_of(trace, load.seed)))
    return observed(running.recording, began_s)


def fit_of(kind: Kind, alone: Alone, *seen: Observed) -> Fit:
    """Messages and link are those of requests alone, by the steps of that time. Steps are those that were seen."""
    idle = alone.observed
    steps = {role: [step for each in seen for step in each.steps[role]] for role in WORKER_ROLES}
    return fitted(_ENGINES[kind], idle.worker, idle.steps, steps, alone.records)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """An open loop."""

    requests: int
    per_s: float
    seed: int


async def send_alone(running: Cluster, requests: int, seed: int) -> Sequence[RequestRecord]:
    """One after the other. By turns: a decode worker that is idle may be predicted to be as soon, and moves no KV."""
    trace = made(ALONE, requests, 1.0, seed, COMMON["engine.block_size_tokens"])
    prompts = prompts_of(trace, seed, ROUND_ROBIN)
    return whole(await client.run(running.grpc_address, MODEL_NAME, prompts, alone=True))


def whole(records: Sequence[RequestRecord]) -> Sequence[RequestRecord]:
    """The records, none of which failed. Raises ValueError."""
    if failed := [each.error for each in records if not each.succeeded]:
        raise ValueError(f"{len(failed)} requests failed in the calibration: {failed[0]}")
    return records


def hash_of(seed: int, part: str) -> int:
    """A seed of its own for each part."""
    return seed * 1009 + sum(part.encode())


async def compare(kind: Kind, shape: Shape, spec: FidelitySpec, folder: Path) -> Compared:
    """One cluster. It is calibrated before and after each repeat: the machine is not as fast at all times."""
    name = f"{kind}:{shape.name}"

    def load(requests: int, part: str, fit: Fit) -> Load:
        per_s = rate(fit.model, CALIBRATION[kind], shape.prefill, spec.load)
        return Load(requests=requests, per_s=per_s, seed=hash_of(spec.seed, part))

    async with cluster.running(shape, folder, pin_engines=kind == "vllm") as running:
        alone = await calibrated_alone(running, spec.seed)
        # At a rate by the steps of an idle cluster; the next ones are at a rate by the steps of this one.
        first = await calibration(running, kind, load(FIRST_REQUESTS, "first", fit_of(kind, alone, alone.observed)))
        fit = fit_of(kind, alone, first)
        before = await calibration(running, kind, load(CALIBRATION_REQUESTS, "calibration", fit))
        fit = fit_of(kind, alone, before)
        per_s = rate(fit.model, MEASURED[kind], shape.prefill, spec.load)
        # The same arrivals in every repeat, of other tokens.
        trace = made(MEASURED[kind], spec.requests, per_s, hash_of(spec.seed, "measured"), fit.model.block_size_tokens)
        repeats = []
        for index in range(spec.repeats):
            began_s = recording.last_s(running.recording)
            prompts = prompts_of(trace, hash_of(spec.seed, f"repeat {index}"))
            real = of_records(await client.run(running.grpc_address, MODEL_NAME, prompts))
            whole_real = whole_share(running.recording, began_s)
            after = await calibration(running, kind, load(CALIBRATION_REQUESTS, f"calibration {index}", fit))
            fit, before = fit_of(kind, alone, before, after), after
            outcomes = simulated(fit.model, trace, shape, index).outcomes
            one = Repeat(
                fit=fit,
                real=real,
                simulated=of_outcomes(outcomes),
                whole_real=whole_real,
                whole_simulated=statistics.fmean(each.whole for each in outcomes),
            )
            repeats.append(one)
            say(f"{name}: repeat {index + 1}: TTFT {real.ttft_mean_s:.4f} s, simulated {one.simulated.ttft_mean_s:.4f}")
        return Compared(
            cluster=name,
            bounded=name != "vllm:2P1D",
            per_s=per_s,
            repeats=repeats,
            errors=errors([each.real for each in repeats], [each.simulated for each in repeats]),
            pinned=dict(running.pinned),
        )


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def as_table(compared: Sequence[Compared]) -> str:
    """For people, in Markdown."""
    lines = ["| cluster | measure | real | simulated | error | spread of the repeats | bound | within |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in compared:
        for each in one.errors:
            verdict = each.verdict if one.bounded else " | "
            lines.append(
                f"| {one.cluster} | {each.measure} | {each.real:.5g} | {each.simulated:.5g} | {each.error:+.1%} | "
                f"{each.spread:.1%} | {verdict} |"
            )
    return "\n".join(lines)


def parsed(name: str) -> tuple[Kind, int, int]:
    """``fake:4P4D``. Raises ValueError."""
    kind, _, shape = name.partition(":")
    prefill, _, decode = shape.removesuffix("D").partition("P")
    if kind not in _ENGINES or not (prefill.isdecimal() and decode.isdecimal()):
        raise ValueError(f"{name!r} is not ENGINE:nPmD with an engine of {', '.join(_ENGINES)}")
    return "fake" if kind == "fake" else "vllm", int(prefill), int(decode)


def fidelity(*, json: Path | None = None, spec: FidelitySpec = FidelitySpec(), logs_dir: Path | None = None) -> int:
    """Replay one load on real clusters and in the simulator. The exit code says whether every bound was kept.

    Parameters
    ----------
    json
        where the numbers go
    logs_dir
        default: a new folder
    """
    machine = report.environment()
    folder = logs_dir or Path(tempfile.mkdtemp(prefix="baton-fidelity-"))
    demo = demo_model.ensure(demo_model.default_cache_dir(os.environ))
    made_of = []
    for name in spec.clusters:
        kind, prefill, decode = parsed(name)
        small = kind == "fake" or spec.model == "demo"
        model = demo if small else bench_model.ensure(demo_model.default_cache_dir(os.environ), demo)
        settings = COMMON | (FAKE if kind == "fake" else VLLM)
        shape = Shape(prefill=prefill, decode=decode, settings=settings, model=model, seed=spec.seed)
        logs = folder / name.replace(":", "-")
        logs.mkdir(parents=True, exist_ok=True)
        made_of.append(asyncio.run(compare(kind, shape, spec, logs)))
        if json is not None:
            found = {"machine": machine, "spec": spec, "clusters": made_of}
            json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    print(as_table(made_of))
    print(f"logs: {folder}")
    return 0 if all(each.passed for each in made_of) else 1
