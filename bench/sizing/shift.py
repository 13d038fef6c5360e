"""The command ``python -m bench shift``: a load that moves from long prompts to long outputs and back, in virtual time.

Every fixed split beside the production scheduler that changes roles (`baton tune --apply`).
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

import bench
from scheduler.config import ScalingConfig
from simulation.replay import run
from simulation.replay.report import Report, Slo
from simulation.replay.run import Replay, Scenario
from simulation.replay.traces import MADE_KEY_TOKENS, Arrival, Trace
from simulation.sizing import live_replay, profile_fit

LENGTHS_DIFFER = 0.2
"""Lengths are even between this share less and more."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A load. Means of tokens."""

    per_s: float
    prompt_tokens: int
    output_tokens: int


PROMPTS = Part(per_s=9.0, prompt_tokens=12_000, output_tokens=250)
OUTPUTS = Part(per_s=13.0, prompt_tokens=500, output_tokens=1500)


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One replay. ``flips``: changes of role."""

    name: str
    goodput_rps: float
    attainment: float
    flips: int


def shift(
    *,
    workers: int = 6,
    span_s: float = 500.0,
    steady: bool = False,
    slo: str = "ttft=2,itl=0.018",
    seed: int = 0,
    profile: Path | None = None,
    json: Path | None = None,
) -> int:
    """Replay a load that moves, on every fixed split and with changing roles. It begins at the best fixed one.

    Parameters
    ----------
    span_s
        of each of the three parts
    steady
        long prompts and long outputs mixed evenly all the time instead: nothing should change
    slo
        as in `baton simulate`
    profile
        as in `baton plan`
    json
        where the numbers go
    """
    model = profile_fit.read_model(profile or Path(bench.__file__).parent / "cluster_model.json")
    rng = random.Random(seed)
    parts = [(PROMPTS, 0.4), (OUTPUTS, 0.4)] if steady else [(PROMPTS, 1.0), (OUTPUTS, 1.0), (PROMPTS, 1.0)]
    arrivals: list[Arrival] = []
    for index, (part, share) in enumerate(parts):
        begins_s, long_s = (0.0, 3 * span_s) if steady else (index * span_s, span_s)
        arrivals += arrivals_of(part, share, begins_s, long_s, rng)
    arrivals.sort(key=lambda each: each.arrived_s)
    trace = Trace(key_tokens=MADE_KEY_TOKENS, arrivals=arrivals)

    def scenario(prefill: int) -> Scenario:
        return Scenario(
            trace=trace, model=model, prefill=prefill, decode=workers - prefill, seed=seed, slo=Slo.parse(slo)
        )

    found = []
    for prefill in range(workers):
        report = Replay(scenario(prefill), "baton", run.POLICIES["baton"]).run()
        found.append(_shown(f"{prefill}P{workers - prefill}D" if prefill else f"{workers} together", report, 0))
    best = max(range(workers), key=lambda prefill: found[prefill].goodput_rps)
    report, live = live_replay.replay(scenario(best), ScalingConfig(apply=True))
    found.append(_shown(f"live, from {found[best].name}", report, len(live.changes)))
    gain = found[-1].goodput_rps / found[best].goodput_rps - 1.0
    print(f"live beside the best fixed split: {gain:+.1%} goodput, {len(live.changes)} changes of role")
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return 0


def arrivals_of(part: Part, share: float, begins_s: float, long_s: float, rng: random.Random) -> list[Arrival]:
    """``share`` of its rate, at random times."""

    def near(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - LENGTHS_DIFFER, 1 + LENGTHS_DIFFER)))

    made, at_s = [], begins_s
    while (at_s := at_s + rng.expovariate(share * part.per_s)) < begins_s + long_s:
        made.append(
            Arrival(arrived_s=at_s, prompt_tokens=near(part.prompt_tokens), output_tokens=near(part.output_tokens))
        )
    return made


def _shown(name: str, report: Report, flips: int) -> Shown:
    shown = Shown(name=name, goodput_rps=report.goodput_rps, attainment=report.attainment, flips=flips)
    print(f"{name:<22} {shown.goodput_rps:7.3f} requests/s, {shown.attainment:6.1%} kept, {flips} flips", flush=True)
    return shown
