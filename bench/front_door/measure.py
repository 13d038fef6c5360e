"""One visit to one front end: CPU a request, CPU a streamed token, first tokens of a burst. Starts no process."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators

from bench.front_door.client import Client
from bench.front_door.systems import SYSTEM_NAMES, Front, SystemName
from bench.measures import RequestRecord
from runtime.process import command_line

SHORT_TOKENS = 2
LONG_TOKENS = 128
BURST = 64
GRPC_IN_FLIGHT = 64
_ALONE_STREAMS = 3
_IDLE_S = 1.0


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontDoorSpec:
    """Sizes of a visit."""

    systems: Annotated[
        tuple[SystemName, ...],
        command_line.one_or_more_of(SYSTEM_NAMES, "what is compared (default: what can be installed)", "NAMES"),
    ] = ()
    rounds: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 5
    step_ms: Annotated[float, Parameter(validator=validators.Number(gte=2, lte=50))] = 25.0
    """what an engine takes for one token of every running request"""
    in_flight: int = 32
    requests: int = 400
    """requests of 2 output tokens"""
    streams: int = 64
    """requests of 128 output tokens"""
    bursts: int = 3
    """bursts of 64 requests"""
    prompt_tokens: int = 256
    seed: int = 0
    timeout_s: float = 300.0
    """of one load"""


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """What one front end did in one round."""

    system: SystemName
    round: int
    values: Mapping[str, float]
    tokens_per_chunk: float
    errors: Sequence[str]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a load cost the front end, and what came of it."""

    cpu_s: float
    records: Sequence[RequestRecord]


def cpu_s(pid: int) -> float:
    """User and system time of all threads of a process so far, as in /proc/PID/stat, but not in steps of 10 ms.

    Raises OSError when it has ended.
    """
    # How Linux names another process's CPU clock: clock_getcpuclockid(3), which Python does not have.
    return time.clock_gettime(~pid << 3 | 2)


def cpu_ms_per_request(load: Load) -> float:
    """Of requests with few tokens."""
    return load.cpu_s * 1e3 / len(load.records)


def cpu_us_per_token(long: Load, request_ms: float) -> float:
    """Of the tokens that requests of ``long`` have beyond those that are in the cost of a request."""
    further = len(long.records) * (LONG_TOKENS - SHORT_TOKENS)
    return (long.cpu_s * 1e6 - len(long.records) * request_ms * 1e3) / further


def prompts_of_visit(spec: FrontDoorSpec) -> int:
    """How many prompts a visit takes at most; none comes twice to one system."""
    one_load = spec.in_flight + spec.requests + spec.streams
    grpc_alone = spec.in_flight + spec.in_flight + _ALONE_STREAMS
    return one_load + spec.bursts * BURST + spec.requests + 2 * GRPC_IN_FLIGHT + grpc_alone


async def visit(
    name: SystemName, front: Front, client: Client, *, spec: FrontDoorSpec, prompts: Sequence[str], round_index: int
) -> Visit:
    """Warm up, then measure."""
    waiting = iter(prompts)
    records: list[RequestRecord] = []

    async def load(requests: int, output_tokens: int, in_flight: int) -> Load:
        chosen = list(itertools.islice(waiting, requests))
        assert len(chosen) == requests, "prompts_of_visit counts them"
        before_s = cpu_s(front.pid)
        found = await client.run(chosen, output_tokens=output_tokens, in_flight=in_flight)
        used = Load(cpu_s=cpu_s(front.pid) - before_s, records=found)
        records.extend(found)
        return used

    async def both(in_flight: int, requests: int, streams: int) -> tuple[float, float]:
        request_ms = cpu_ms_per_request(await load(requests, SHORT_TOKENS, in_flight))
        return request_ms, cpu_us_per_token(await load(streams, LONG_TOKENS, in_flight), request_ms)

    await load(spec.in_flight, SHORT_TOKENS, spec.in_flight)
    request_ms, token_us = await both(spec.in_flight, spec.requests, spec.streams)
    firsts = [await load(BURST, SHORT_TOKENS, BURST) for _ in range(spec.bursts)]
    before_s = cpu_s(front.pid)
    await asyncio.sleep(_IDLE_S)  # what it uses when nothing happens
    idle_ms = (cpu_s(front.pid) - before_s) * 1e3 / _IDLE_S
    values = {
        "cpu_ms_per_request": request_ms,
        "cpu_us_per_token": token_us,
        "requests_per_core_s": 1e3 / request_ms,
        "tokens_per_core_s": 1e6 / token_us,
        "idle_cpu_ms_per_s": idle_ms,
        "burst64_ttft_mean_ms": statistics.fmean(_first_tokens_ms(firsts)),
    }
    if name == "baton_grpc":
        many = await both(GRPC_IN_FLIGHT, spec.requests, 2 * GRPC_IN_FLIGHT)
        alone = await both(1, spec.in_flight, _ALONE_STREAMS)
        for suffix, (request, token) in {"64_in_flight": many, "alone": alone}.items():
            values |= {f"cpu_ms_per_request_{suffix}": request, f"cpu_us_per_token_{suffix}": token}
    good = [record for record in records if record.succeeded]
    chunks = sum(len(record.chunk_times_s) for record in good)
    return Visit(
        system=name,
        round=round_index,
        values=values,
        tokens_per_chunk=sum(record.output_tokens for record in good) / chunks if chunks else 0.0,
        errors=[record.error or "no output" for record in records if not record.succeeded],
    )


def _first_tokens_ms(loads: Sequence[Load]) -> Iterator[float]:
    found = [record.ttft_s * 1e3 for one in loads for record in one.records if record.succeeded]
    yield from found or [0.0]
