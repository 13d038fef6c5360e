"""The command real-routing: our planner and two that know no prefixes on one real cluster, round by round in turn."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from cyclopts import Parameter

from bench import bench_model, report
from bench.live import client, cluster, recording
from bench.live.client import Prompt
from bench.live.cluster import MODEL_NAME, Cluster, Shape
from bench.live.fidelity import COMMON, VLLM, say
from bench.live.planners import OURS, PLANNERS, ROUND_ROBIN, ByTenant, planner_of
from bench.live.sessions import Sessions
from bench.live.workload import random_tokens
from bench.measures import RequestRecord
from launcher.demo import model as demo_model
from scheduler.api.events import PlanRequested, RequestEnded, WorkerLoadReported
from simulation.replay.report import quantile

# Room for about 10,000 tokens: less than the shared texts and the sessions in progress need, or every worker would
# hold everything soon.
_KV_BYTES = 64 << 20
_FULL_TOKENS, _MORE_TOKENS, _HANDOFFS = 768, 64, 5
_REPORTED_WITHIN_S = 5.0
# The recording is written out at every tick of the scheduler.
_LOOK_INTERVAL_S = 0.25


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RealRoutingSpec:
    """How much is measured."""

    rounds: int = 5
    requests: int = 120
    """of each planner in each round"""
    per_s: float = 12.0
    prefill: int = 2
    decode: int = 1
    seed: int = 1
    engine: str = "vllm"
    """vllm, or fake to try the command"""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One planner in one round."""

    planner: str
    round: int
    failed: int
    prompt_tokens: int
    hit_tokens: int
    ttft_p50_s: float
    ttft_p99_s: float


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Ours over another planner's, of the same round: median, lowest and highest."""

    measure: str
    over: str
    median: float
    low: float
    high: float


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """KV that a decode worker pulled for one request, by its counter."""

    prompt_tokens: int
    pulled_bytes: int
    # Whether it had the beginning of the prompt.
    delta: bool


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """All that the command found."""

    segments: Sequence[Segment]
    ratios: Sequence[Ratio]
    handoffs: Sequence[Handoff]
    # Decisions of the real scheduler, and how many of them the simulator's core takes alike.
    decisions: int
    decisions_alike: int


def hits(file: Path, since_s: float) -> dict[str, int]:
    """Cached tokens of requests that were planned since then, by tenant."""
    _, entries = recording.read(file)
    tenants: dict[tuple[int, int], str] = {}
    found: dict[str, int] = {}
    for entry in entries:
        match entry.event:
            case PlanRequested(session=session, plan_id=plan_id, tenant=tenant) if entry.now_s > since_s:
                tenants[session, plan_id] = planner_of(tenant)
            case RequestEnded(session=session, plan_id=plan_id, cached_tokens=cached) if (session, plan_id) in tenants:
                tenant = tenants.pop((session, plan_id))
                found[tenant] = found.get(tenant, 0) + cached
            case _:
                pass
    return found


def alike(file: Path) -> tuple[int, int]:
    """Decisions of a recording, and how many of them a core with the same seed takes when it is told the same."""
    count = same = 0
    for entry, again in recording.decided_again(file, ByTenant):
        count += max(len(entry.decisions), len(again))
        same += sum(one == other for one, other in zip(entry.decisions, again, strict=False))
    return count, same


def ratios(segments: Sequence[Segment]) -> list[Ratio]:
    """Round by round."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for each in segments:
        for measure in ("hit_tokens", "ttft_p50_s"):
            values.setdefault((measure, each.planner), {})[each.round] = float(getattr(each, measure))
    found = []
    for (measure, planner), others in values.items():
        if planner == OURS:
            continue
        ours = values[measure, OURS]
        shares = sorted(ours[index] / other for index, other in others.items() if other and index in ours)
        if shares:
            found.append(
                Ratio(
                    measure=measure,
                    over=planner,
                    median=statistics.median(shares),
                    low=shares[0],
                    high=shares[-1],
                )
            )
    return found


def segment(planner: str, index: int, records: Sequence[RequestRecord], hit_tokens: int) -> Segment:
    """What one planner's load came to."""
    good = [each for each in records if each.succeeded]
    ttfts = sorted(each.ttft_s for each in good)
    return Segment(
        planner=planner,
        round=index,
        failed=len(records) - len(good),
        prompt_tokens=sum(each.prompt_tokens for each in good),
        hit_tokens=hit_tokens,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p99_s=quantile(ttfts, 0.99),
    )


async def rounds(running: Cluster, spec: RealRoutingSpec) -> list[Segment]:
    """Every planner in every round; each round begins with another one."""
    made = Sessions(requests=spec.requests, per_s=spec.per_s)
    found = []
    for index in range(-1, spec.rounds):
        turn = index % len(PLANNERS)
        for planner in PLANNERS[turn:] + PLANNERS[:turn]:
            since_s = recording.last_s(running.recording)
            prompts = made.prompts(spec.seed * 1009 + index, planner)
            records = await client.run(running.grpc_address, MODEL_NAME, prompts)
            await _settled(running.recording, since_s, sum(each.succeeded for each in records))
            one = segment(planner, index, records, hits(running.recording, since_s).get(planner, 0))
            say(f"round {index + 1}/{spec.rounds}: {one}")
            # The round before the first one warms the engines, and teaches the scheduler how fast they are.
            if index >= 0:
                found.append(one)
    return found


async def _settled(file: Path, since_s: float, requests: int) -> None:
    """Until the scheduler heard of every end: a front proxy sends them a little later."""
    await _until(lambda: sum(1 for _ in _ends(file, since_s)) >= requests)


async def _until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(_REPORTED_WITHIN_S):
        while not seen():  # noqa: ASYNC110 - another process writes the recording, and tells of nothing else
            await asyncio.sleep(_LOOK_INTERVAL_S)


def _ends(file: Path, since_s: float) -> Iterator[RequestEnded]:
    _, entries = recording.read(file)
    return (each.event for each in entries if each.now_s > since_s and isinstance(each.event, RequestEnded))


async def handoffs(running: Cluster, seed: int) -> list[Handoff]:
    """Pairs of prompts alone on the cluster, of which the second one goes on where the first one ends."""
    rng, found = random.Random(f"{seed} hand-offs"), []
    for _ in range(_HANDOFFS):
        known: list[int] = []
        for delta in (False, True):
            known += random_tokens(_MORE_TOKENS if delta else _FULL_TOKENS, rng)
            since_s, before = recording.last_s(running.recording), pulled_bytes(running.recording)
            # By round robin: it never computes a prompt on the decode worker.
            prompt = Prompt(due_s=0.0, token_ids=tuple(known), output_tokens=4, tenant=ROUND_ROBIN)
            await client.run(running.grpc_address, MODEL_NAME, [prompt])
            await _settled(running.recording, since_s, 1)
            # What is new must be pulled, and the counter comes with a later report.
            await _until(lambda: pulled_bytes(running.recording) > before)  # noqa: B023 - it ends before the next turn
            pulled = pulled_bytes(running.recording) - before
            found.append(Handoff(prompt_tokens=len(known), pulled_bytes=pulled, delta=delta))
    return found


def pulled_bytes(file: Path) -> int:
    """All that workers pulled, as they last said."""
    _, entries = recording.read(file)
    last = {
        each.event.worker_id: each.event.load.kv_bytes_in
        for each in entries
        if isinstance(each.event, WorkerLoadReported)
    }
    return sum(last.values())


async def measure(shape: Shape, spec: RealRoutingSpec, folder: Path) -> Found:
    """Start, measure, end."""
    async with cluster.running(shape, folder, pin_engines=spec.engine == "vllm") as running:
        segments = await rounds(running, spec)
        moved = await handoffs(running, spec.seed)
    count, same = alike(folder / cluster.RECORDING)
    return Found(segments=segments, ratios=ratios(segments), handoffs=moved, decisions=count, decisions_alike=same)


def as_text(found: Found) -> str:
    """For people, in Markdown."""
    lines = ["| planner | hit tokens a round | share of the prompts | TTFT p50, ms | TTFT p99, ms |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for planner in PLANNERS:
        own = [each for each in found.segments if each.planner == planner]
        share = sum(each.hit_tokens for each in own) / max(1, sum(each.prompt_tokens for each in own))
        cells = (_range([each.hit_tokens for each in own], 1), f"{share:.0%}")
        times = (_range([each.ttft_p50_s for each in own], 1e3), _range([each.ttft_p99_s for each in own], 1e3))
        lines.append(f"| `{planner}` | {' | '.join((*cells, *times))} |")
    lines += [
        f"{each.measure}, {OURS} / {each.over}: {each.median:.2f} ({each.low:.2f}-{each.high:.2f})"
        for each in found.ratios
    ]
    for delta, name in ((False, "whole"), (True, "delta")):
        pulled = [each.pulled_bytes for each in found.handoffs if each.delta is delta]
        lines.append(f"hand-off, {name}: {_range(pulled, 1)} bytes pulled")
    lines.append(f"decisions alike: {found.decisions_alike} of {found.decisions}")
    return "\n".join(lines)


def _range(values: Sequence[float], times: float) -> str:
    scaled = [value * times for value in values]
    return f"{statistics.median(scaled):,.0f} ({min(scaled):,.0f}-{max(scaled):,.0f})"


def shape_of(spec: RealRoutingSpec, models: Mapping[str, Path]) -> Shape:
    """What is started."""
    fake = spec.engine == "fake"
    settings = COMMON | ({"engine.kind": "fake", "engine.fake.kv_blocks_total": 200} if fake else VLLM)
    if not fake:
        settings |= {"engine.kv_cache_bytes": _KV_BYTES}
    return Shape(
        prefill=spec.prefill,
        decode=spec.decode,
        settings=settings,
        model=models[spec.engine],
        seed=spec.seed,
    )


def real_routing(
    *,
    json: Path | None = None,
    spec: RealRoutingSpec = RealRoutingSpec(),
    logs_dir: Path | None = None,
) -> int:
    """Compare planners on one real cluster, in turn. The exit code says whether every request was served.

    Parameters
    ----------
    json
        where the numbers go
    logs_dir
        default: a new folder
    """
    machine = report.environment()
    folder = logs_dir or Path(tempfile.mkdtemp(prefix="baton-real-routing-"))
    folder.mkdir(parents=True, exist_ok=True)
    cache = demo_model.default_cache_dir(os.environ)
    demo = demo_model.ensure(cache)
    models = {"fake": demo} if spec.engine == "fake" else {"vllm": bench_model.ensure(cache, demo)}
    found = asyncio.run(measure(shape_of(spec, models), spec, folder))
    if json is not None:
        made = {"machine": machine, "spec": spec, "found": found}
        json.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
    print(as_text(found))
    print(f"logs: {folder}")
    return 1 if any(each.failed for each in found.segments) else 0
