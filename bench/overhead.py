"""What serving adds to its engines: side-by-side runs in interleaved rounds, as docs/benchmarks.md says.

Starts and stops systems; judges nothing. The order turns by one from round to round, so that a drift of the machine
meets all systems.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bench import cpu
from bench.load import LoadRun, LoadSpec, OpenAiBackend, client_session, run_load
from bench.measures import summarise
from bench.peers import ENGINES, SYSTEM_NAMES, EngineShape, PeerOptions, System, SystemName, start_system
from bench.prompts import Count, make_prompts
from runtime.process import command_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverheadSpec:
    """Sizes of a visit. Lengths are tokens."""

    systems: Annotated[
        tuple[SystemName, ...],
        command_line.one_or_more_of(SYSTEM_NAMES, "what is compared (default: what is installed)", "NAMES"),
    ] = ()
    rounds: int = 3
    latency_requests: int = 20
    latency_prompt_tokens: int = 512
    latency_output_tokens: int = 16
    cpu_concurrency: int = 16
    cpu_requests: int = 64
    cpu_prompt_tokens: int = 128
    cpu_output_tokens: int = 128
    warmup_requests: int = 4
    seed: int = 0
    timeout_s: float = 120.0
    engines_at_once_max: int = 3
    """more engines than this are not started side by side"""


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """What one system did in one round."""

    system: SystemName
    round: int
    ttft_median_ms: float
    tpot_median_ms: float
    cpu_other_s_per_1000_tokens: float
    cpu_engine_s_per_1000_tokens: float
    cpu_other_by_process: Mapping[str, float]
    tokens_per_chunk: float
    latency: Mapping[str, Any]
    throughput: Mapping[str, Any]
    warmup_failed: int
    errors: tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one system over the same measure of another: the ratio of each round that has both."""

    measure: str
    system: SystemName
    over: SystemName
    median: float
    low: float
    high: float
    rounds: tuple[float, ...]


def side_by_side(spec: OverheadSpec) -> bool:
    """Whether every system stays up for all rounds."""
    return sum(ENGINES[name] for name in spec.systems) <= spec.engines_at_once_max


def order_of(systems: Sequence[SystemName], round_index: int) -> list[SystemName]:
    """The round's order: turned by one each time."""
    turn = round_index % len(systems)
    return [*systems[turn:], *systems[:turn]]


async def visit(system: System, *, model: str, spec: OverheadSpec, count: Count, round_index: int) -> Visit:
    """Warm up, then measure latency alone and CPU in company."""
    alone = LoadSpec(output_tokens=spec.latency_output_tokens, concurrency=1, timeout_s=spec.timeout_s)
    company = LoadSpec(output_tokens=spec.cpu_output_tokens, concurrency=spec.cpu_concurrency, timeout_s=spec.timeout_s)

    async def load(part: int, requests: int, prompt_tokens: int, how: LoadSpec) -> LoadRun:
        seed = (spec.seed * 1009 + round_index) * 4 + part
        prompts = make_prompts(requests=requests, tokens=prompt_tokens, seed=seed, count=count)
        backend = OpenAiBackend(session, base_url=system.base_url, model=model, timeout_s=spec.timeout_s)
        return await run_load(backend, prompts, how)

    async with client_session() as session:
        warmup = await load(0, spec.warmup_requests, spec.latency_prompt_tokens, alone)
        warmup_company = await load(1, spec.cpu_concurrency, spec.cpu_prompt_tokens, company)
        latency = await load(2, spec.latency_requests, spec.latency_prompt_tokens, alone)
        before = cpu.read(system.root_pids)
        throughput = await load(3, spec.cpu_requests, spec.cpu_prompt_tokens, company)
        use = cpu.used(before, cpu.read(system.root_pids))
    records = [*latency.records, *throughput.records]
    tokens = sum(record.output_tokens for record in throughput.records if record.succeeded)
    chunks = sum(len(record.chunk_times_s) for record in throughput.records if record.succeeded)
    first_tokens_ms = [record.ttft_s * 1000.0 for record in latency.records if record.succeeded]
    gaps_ms = [record.tpot_s * 1000.0 for record in latency.records if record.succeeded]
    return Visit(
        system=system.name,
        round=round_index,
        ttft_median_ms=statistics.median(first_tokens_ms) if first_tokens_ms else 0.0,
        tpot_median_ms=statistics.median(gaps_ms) if gaps_ms else 0.0,
        cpu_other_s_per_1000_tokens=use.other_s * 1000.0 / tokens if tokens else 0.0,
        cpu_engine_s_per_1000_tokens=use.engine_s * 1000.0 / tokens if tokens else 0.0,
        cpu_other_by_process=use.other_by_process,
        tokens_per_chunk=tokens / chunks if chunks else 0.0,
        latency=summarise(latency.records, duration_s=latency.duration_s),
        throughput=summarise(throughput.records, duration_s=throughput.duration_s),
        warmup_failed=sum(not record.succeeded for record in [*warmup.records, *warmup_company.records]),
        errors=tuple(record.error or "no output" for record in records if not record.succeeded),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def run_rounds(
    spec: OverheadSpec, shape: EngineShape, options: PeerOptions, logs_dir: Path, count: Count
) -> list[Visit]:
    """Every visit, in the order they were made."""
    visits: list[Visit] = []
    kept: dict[SystemName, System] = {}
    try:
        for round_index in range(spec.rounds):
            for name in order_of(spec.systems, round_index):
                system = kept.get(name)
                if system is None:
                    _say(f"round {round_index + 1}/{spec.rounds}: starting {name}")
                    folder = logs_dir if side_by_side(spec) else logs_dir / f"round_{round_index}"
                    system = await start_system(name, shape, options, folder)
                    kept[name] = system
                made = await visit(
                    system, model=shape.served_model_name, spec=spec, count=count, round_index=round_index
                )
                visits.append(made)
                _say(
                    f"round {round_index + 1}/{spec.rounds}: {name}: TTFT {made.ttft_median_ms:.1f} ms, other CPU "
                    f"{made.cpu_other_s_per_1000_tokens:.3f} s/1,000 tokens, failed {len(made.errors)}"
                )
                if not side_by_side(spec):
                    await kept.pop(name).stop()
    finally:
        for system in kept.values():
            await system.stop()
    return visits


def compare(visits: Sequence[Visit]) -> list[Comparison]:
    """Each system over each other one, round by round; only rounds in which both have the measure."""
    values: dict[str, dict[SystemName, dict[int, float]]] = {}
    for one in visits:
        for measure, value in (
            ("ttft_median_ms", one.ttft_median_ms),
            ("tpot_median_ms", one.tpot_median_ms),
            ("cpu_other_s_per_1000_tokens", one.cpu_other_s_per_1000_tokens),
            ("output_throughput", one.throughput["output_throughput"]),
        ):
            if value > 0.0:
                values.setdefault(measure, {}).setdefault(one.system, {})[one.round] = value
    comparisons: list[Comparison] = []
    for measure, systems in values.items():
        for (system, above), (over, below) in itertools.permutations(systems.items(), 2):
            if rounds := tuple(above[index] / below[index] for index in sorted(above.keys() & below.keys())):
                median, low, high = statistics.median(rounds), min(rounds), max(rounds)
                comparisons.append(
                    Comparison(
                        measure=measure, system=system, over=over, median=median, low=low, high=high, rounds=rounds
                    )
                )
    return comparisons


def model_folder(model: str) -> Path:
    """The folder of the model; its tokenizer file makes prompts of exact lengths."""
    folder = Path(model)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{model} is not a folder with a tokenizer.json, which exact prompt lengths need")
    return folder
