"""The command live-shift: a load that moves as in `bench shift`, on real clusters: fixed splits and changing roles."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cyclopts import Parameter

from bench import bench_model, report
from bench.live import client, cluster, fidelity, recording
from bench.live.client import Prompt
from bench.live.cluster import MODEL_NAME, Shape
from bench.live.fidelity import Kind
from bench.live.workload import prompts_of
from bench.measures import RequestRecord, Slo
from bench.sizing.shift import Part, arrivals_of
from launcher.demo import model as demo_model
from scheduler.api.events import WorkerJoined
from simulation.replay.traces import Trace

PARTS = 3
"""Long prompts, long outputs, long prompts again."""


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveShiftSpec:
    """What is served."""

    kind: Kind = "vllm"
    """vLLM's engines, or fake ones"""
    workers: int = 3
    fixed: Sequence[int] = (1, 2)
    """prefill workers of each fixed split"""
    live: Sequence[int] = (1,)
    """prefill workers with which each cluster begins whose planner may change roles"""
    span_s: float = 60.0
    """of each of the three parts"""
    prompts_per_s: float = 6.0
    prompt_tokens: int = 1000
    """mean, of the parts with long prompts"""
    short_output_tokens: int = 8
    """of these parts"""
    outputs_per_s: float = 4.0
    output_tokens: int = 100
    """mean, of the part with long outputs"""
    short_prompt_tokens: int = 80
    """of this part"""
    ttft_slo_s: float = 1.0
    itl_slo_s: float = 0.03
    cores_an_engine: float = 0.0
    """share of CPU that is each worker's alone, by a cgroup, as on a machine of its own; 0: they share all cores"""
    seed: int = 1


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster. ``kept``: share of the requests of each part that kept both bounds."""

    name: str
    goodput_rps: float
    kept: Sequence[float]
    failed: int
    # Seconds after the first request, worker, its new role.
    flips: Sequence[tuple[float, str, str]]


def live_shift(*, json: Path | None = None, spec: LiveShiftSpec = LiveShiftSpec(), logs_dir: Path | None = None) -> int:
    """Serve a load that moves, on fixed splits and with changing roles. The exit code says whether none failed.

    Requests ask for the bounds. One that is refused, since it would not be served in time, has not failed.

    Parameters
    ----------
    json
        where the numbers go
    logs_dir
        default: a new folder
    """
    folder = logs_dir or Path(tempfile.mkdtemp(prefix="baton-live-shift-"))
    found = [asyncio.run(_served(spec, prefill, folder, lives=False)) for prefill in spec.fixed]
    found += [asyncio.run(_served(spec, prefill, folder, lives=True)) for prefill in spec.live]
    print(f"logs: {folder}")
    if json is not None:
        told = {"machine": report.environment(), "spec": spec, "found": found}
        json.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")
    return 1 if any(each.failed for each in found) else 0


def trace_of(spec: LiveShiftSpec) -> Trace:
    """The same for every cluster."""
    rng = random.Random(spec.seed)
    prompts = Part(per_s=spec.prompts_per_s, prompt_tokens=spec.prompt_tokens, output_tokens=spec.short_output_tokens)
    outputs = Part(per_s=spec.outputs_per_s, prompt_tokens=spec.short_prompt_tokens, output_tokens=spec.output_tokens)
    arrivals = [
        each
        for index, part in enumerate((prompts, outputs, prompts))
        for each in arrivals_of(part, 1.0, index * spec.span_s, spec.span_s, rng)
    ]
    return Trace(key_tokens=fidelity.COMMON["engine.block_size_tokens"], arrivals=arrivals)


def part_of(spec: LiveShiftSpec, due_s: float) -> int:
    """0, 1 or 2."""
    return min(PARTS - 1, int(due_s / spec.span_s))


def served(name: str, spec: LiveShiftSpec, records: Sequence[RequestRecord]) -> Served:
    """What its clients saw."""
    slo = Slo(ttft_ms=1e3 * spec.ttft_slo_s, tpot_ms=1e3 * spec.itl_slo_s)
    good, every = [0] * PARTS, [0] * PARTS
    for each in records:
        every[part_of(spec, each.due_s)] += 1
        good[part_of(spec, each.due_s)] += slo.kept_by(each)
    failed = sum(not each.succeeded and not each.error.startswith("EXHAUSTED") for each in records)
    return Served(
        name=name,
        goodput_rps=sum(good) / (PARTS * spec.span_s),
        kept=[one / max(1, of) for one, of in zip(good, every, strict=True)],
        failed=failed,
        flips=(),
    )


async def _served(spec: LiveShiftSpec, prefill: int, folder: Path, *, lives: bool) -> Served:
    split = f"{prefill}P{spec.workers - prefill}D"
    name = f"live, from {split}" if lives else split
    logs = folder / name.replace(", ", "-").replace(" ", "-")
    logs.mkdir(parents=True, exist_ok=True)
    shape = _shape(spec, prefill, lives=lives)
    async with cluster.running(shape, logs, cores_an_engine=spec.cores_an_engine) as running:
        await fidelity.send_alone(running, fidelity.WARM_REQUESTS * spec.workers, spec.seed)
        since_s = recording.last_s(running.recording)
        records = await client.run(running.grpc_address, MODEL_NAME, _prompts(spec))
    found = served(name, spec, records)
    found = msgspec.structs.replace(found, flips=flips_of(logs / cluster.RECORDING, since_s))
    kept = ", ".join(f"{share:.0%}" for share in found.kept)
    flips = "; ".join(f"{worker} to {role} at {at_s:.0f} s" for at_s, worker, role in found.flips) or "no change"
    print(
        f"{name:<18} {found.goodput_rps:6.3f} good requests/s; kept {kept}; failed {found.failed}; {flips}", flush=True
    )
    return found


def flips_of(file: Path, since_s: float) -> Sequence[tuple[float, str, str]]:
    """Registrations in another role than before."""
    roles: dict[str, str] = {}
    found = []
    for entry in recording.read(file)[1]:
        if isinstance(entry.event, WorkerJoined):
            info = entry.event.info
            if roles.get(info.worker_id, info.role) != info.role:
                found.append((entry.now_s - since_s, info.worker_id, info.role))
            roles[info.worker_id] = info.role
    return found


def _prompts(spec: LiveShiftSpec) -> list[Prompt]:
    slo = {"ttft_slo_ms": 1e3 * spec.ttft_slo_s, "tpot_slo_ms": 1e3 * spec.itl_slo_s}
    return [msgspec.structs.replace(each, **slo) for each in prompts_of(trace_of(spec), spec.seed)]


def _shape(spec: LiveShiftSpec, prefill: int, *, lives: bool) -> Shape:
    demo = demo_model.ensure(demo_model.default_cache_dir(os.environ))
    fake = spec.kind == "fake"
    model = demo if fake else bench_model.ensure(demo_model.default_cache_dir(os.environ), demo)
    scaling: dict[str, object] = {
        "scheduler.scaling.apply": str(lives).lower(),
        "scheduler.scaling.itl_s": spec.itl_slo_s,
    }
    settings = {**fidelity.COMMON, **(fidelity.FAKE if fake else fidelity.VLLM), **scaling}
    return Shape(prefill=prefill, decode=spec.workers - prefill, settings=settings, model=model, seed=spec.seed)
