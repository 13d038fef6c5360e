"""The command accounts: what keys, usage records and limits add to the CPU of a front proxy and of a scheduler."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from cyclopts import Parameter, validators

import baton_llm
from accounts.config import LIMITS
from bench.front_door.client import HttpClient
from bench.front_door.measure import cpu_s
from bench.front_door.run import finish, rig
from bench.front_door.systems import MODEL_NAME, Front, Rig, start_baton
from bench.prompts import make_prompts, token_counter
from bench.report import environment

Mode = Literal["off", "count", "enforce", "off again"]
MODES: tuple[Mode, ...] = get_args(Mode)
CONTROL: Mode = "off again"
"""A second cluster like the first one: what it seems to add is what this run cannot tell from nothing."""
PROCESSES = ("scheduler", "front_proxy")
AT_MOST_US: Mapping[str, float] = {"scheduler": 30.0, "front_proxy": 40.0}
"""What a mode may add to a request."""
_SETTLE_S = LIMITS.commit_interval_s + 0.2
_TIMEOUT_S = 300.0
_TEAM = "bench"
# Every scope has limits, of which none is ever reached.
_RULES = f"""
currency = "EUR"
[prices.{MODEL_NAME}]
prompt_per_million = 0.15
cached_per_million = 0.015
output_per_million = 0.6
[cluster]
budgets = ["1000000/month"]
[teams.{_TEAM}]
budgets = ["100000/day", "1000000/month"]
requests_per_minute = 1_000_000
output_tokens_per_minute = 100_000_000
"""


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AccountsSpec:
    """Sizes of the load; 40,320 requests in all, of which the control has a quarter."""

    rounds: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 5
    slices: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 24
    """turns of each mode in a round: what else the machine does meets all modes alike"""
    requests: int = 84
    """of a turn"""
    in_flight: int = 32
    prompt_tokens: int = 256
    output_tokens: int = 8
    step_ms: float = 5.0
    """what an engine takes for one token of every running request"""
    seed: int = 0


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What one mode took in one round, of each process, in us of CPU a request."""

    mode: str
    round: int
    us: Mapping[str, float]
    errors: Sequence[str]
    turns_us: Mapping[str, Sequence[float]] = {}
    """The same of each turn, without what was done before and behind it."""


class Cluster(msgspec.Struct, frozen=True):
    """One mode's."""

    front: Front
    client: HttpClient
    processes: Sequence[str] = PROCESSES
    """Roles of those whose CPU is counted."""

    def cpu_s(self) -> dict[str, float]:
        """Of each, so far."""
        return {name: cpu_s(self.front.pids[name]) for name in self.processes}


async def _start(running: Rig, mode: str) -> Cluster:
    """A cluster of its own. All but ``off`` require keys too."""
    if mode in ("off", CONTROL):
        front = await start_baton(running, mode.replace(" ", "_"))
        return Cluster(front, HttpClient(front.base_url, MODEL_NAME, _TIMEOUT_S))
    rules = running.folder / "rules.toml"
    rules.write_text(_RULES)
    sets = ("auth.mode=required", f"accounts.mode={mode}", f"accounts.rules_file={rules}")
    front = await start_baton(running, mode, sets=sets)
    words = [*baton_llm.command(), "keys", "create", "--team", _TEAM, "--budget", "100000/total", "--json"]
    made = await asyncio.create_subprocess_exec(
        *words, "--state-dir", str(running.folder / f"{mode}_state"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(made.communicate(), _TIMEOUT_S)
    return Cluster(front, HttpClient(front.base_url, MODEL_NAME, _TIMEOUT_S, api_key=json.loads(said)["key"]))


async def _turn(cluster: Cluster, prompts: Sequence[str], spec: AccountsSpec) -> tuple[dict[str, float], list[str]]:
    """CPU seconds of each process, and what failed."""
    before = cluster.cpu_s()
    records = await cluster.client.run(prompts, output_tokens=spec.output_tokens, in_flight=spec.in_flight)
    after = cluster.cpu_s()
    errors = [record.error or "no output" for record in records if not record.succeeded]
    return {name: after[name] - before[name] for name in cluster.processes}, errors


async def _round(
    clusters: Mapping[str, Cluster], spec: AccountsSpec, index: int, prompts: Sequence[str]
) -> list[Round]:
    """Short turns, each begun with another mode, there and back, and a pause in which the last records are written.

    What is written while another mode has its turn is in the CPU of the whole round.
    """
    errors: dict[str, list[str]] = {mode: [] for mode in clusters}
    turns = {mode: {name: list[float]() for name in cluster.processes} for mode, cluster in clusters.items()}
    modes = tuple(clusters)
    before = {mode: cluster.cpu_s() for mode, cluster in clusters.items()}
    for turn in range(spec.slices):
        chosen = prompts[turn * spec.requests : (turn + 1) * spec.requests]
        first = (index + turn // 2) % len(modes)
        order = modes[first:] + modes[:first]
        for mode in order[:: -1 if turn % 2 else 1]:
            took_s, failed = await _turn(clusters[mode], chosen, spec)
            errors[mode] += failed
            for name, seconds in took_s.items():
                turns[mode][name].append(seconds * 1e6 / spec.requests)
    await asyncio.sleep(_SETTLE_S)
    us = 1e6 / (spec.slices * spec.requests)
    rounds = []
    for mode, cluster in clusters.items():
        whole = {name: (seconds - before[mode][name]) * us for name, seconds in cluster.cpu_s().items()}
        rounds.append(Round(mode=mode, round=index, us=whole, errors=errors[mode], turns_us=turns[mode]))
    return rounds


def added_us(one: Round, bases: Sequence[Round], name: str) -> float:
    """What ``one`` took more than the mean of ``bases``, which had the same prompts in the same minute.

    The median over turns, which sees no burst of something else; and what was done between turns, all of it.
    """

    def beside(each: Round) -> float:
        return each.us[name] - statistics.fmean(each.turns_us.get(name, (each.us[name],)))

    turns = zip(*(each.turns_us.get(name, (each.us[name],)) for each in (one, *bases)), strict=True)
    within: float = statistics.median(us - statistics.fmean(of_bases) for us, *of_bases in turns)
    return within + beside(one) - statistics.fmean(beside(each) for each in bases)


async def measure(
    spec: AccountsSpec, sets: Sequence[str], modes: Sequence[str], start: Callable[[Rig, str], Awaitable[Cluster]]
) -> list[Round]:
    """Rounds of clusters that run side by side, one for each mode."""
    rounds: list[Round] = []
    async with rig(spec.step_ms, sets) as running:
        clusters = {mode: await start(running, mode) for mode in modes}
        count = token_counter(running.model)
        a_round = spec.slices * spec.requests
        for index in range(-1, spec.rounds):
            prompts = make_prompts(
                requests=a_round if index >= 0 else spec.requests,
                tokens=spec.prompt_tokens, seed=spec.seed * 1009 + index + 1, count=count,
            )  # fmt: skip
            if index < 0:  # warm up
                for cluster in clusters.values():
                    await _turn(cluster, prompts, spec)
                continue
            rounds += await _round(clusters, spec, index, prompts)
            shown = ", ".join(
                f"{one.mode} {' + '.join(f'{us:.0f}' for us in one.us.values())}" for one in rounds[-len(modes) :]
            )
            print(f"round {index + 1}/{spec.rounds}, us a request: {shown}", file=sys.stderr, flush=True)
    return rounds


async def _measured(spec: AccountsSpec, sets: Sequence[str]) -> dict[str, Any]:
    machine = environment()
    return build(spec, await measure(spec, sets, MODES, _start), machine)


def build(spec: AccountsSpec, rounds: Sequence[Round], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was seen, as one JSON value; what a mode adds is compared within each round."""
    of = {(one.mode, one.round): one for one in rounds}
    indexes = sorted({one.round for one in rounds})
    rows = []
    for mode in MODES:
        for name in PROCESSES:
            row: dict[str, Any] = {"mode": mode, "process": name, "us": [of[mode, at].us[name] for at in indexes]}
            if mode != "off":
                bases = ("off",) if mode == CONTROL else ("off", CONTROL)
                row["added_us"] = [added_us(of[mode, at], [of[each, at] for each in bases], name) for at in indexes]
            if mode not in ("off", CONTROL):
                row |= {"at_most_us": AT_MOST_US[name], "kept": statistics.median(row["added_us"]) <= AT_MOST_US[name]}
            rows.append(row)
    return report_of(spec, rounds, rows, machine)


def report_of(
    spec: AccountsSpec, rounds: Sequence[Round], rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """The rows, with what they were seen of."""
    return {
        "rows": rows,
        "requests": len(rounds) * spec.slices * spec.requests,
        "errors": [f"{one.mode} round {one.round + 1}: {error[:300]}" for one in rounds for error in one.errors[:3]],
        "spec": msgspec.to_builtins(spec),
        "environment": {**machine, "load_average_after": os.getloadavg()},
    }


def text(report: Mapping[str, Any]) -> str:
    """The table that people read first."""
    machine, spec = report["environment"], report["spec"]
    lines = [
        (
            f"{machine['cores']} cores, {machine['processor']}, Python {machine['python']}; load average "
            f"{machine['load_average_before'][0]:.1f} before and {machine['load_average_after'][0]:.1f} after"
        ),
        (
            f"us of CPU a request, medians over {spec['rounds']} rounds (range); {report['requests']:,} requests, "
            f"{spec['in_flight']} in flight, {spec['prompt_tokens']} prompt and {spec['output_tokens']} output tokens"
        ),
        "",
        f"{'accounts.mode':<15}{'process':<14}{'CPU':>20}{'added':>18}{'at most':>9}",
    ]
    for row in report["rows"]:
        line = f"{row['mode']:<15}{row['process']:<14}{_range(row['us']):>20}"
        if "added_us" in row:
            line += f"{_range(row['added_us']):>18}"
        if "kept" in row:
            line += f"{row['at_most_us']:>9.0f}  {'kept' if row['kept'] else 'MISSED'}"
        lines.append(line)
    return "\n".join([*lines, *report["errors"]])


def _range(seen: Sequence[float]) -> str:
    return f"{statistics.median(seen):.0f} ({min(seen):.0f}-{max(seen):.0f})"


_SPEC = AccountsSpec()


def accounts(
    *,
    json: Path | None = None,
    spec: AccountsSpec = _SPEC,
    sets: Annotated[Sequence[str], Parameter(name="--set", metavar="KEY=VALUE")] = (),
) -> int:
    """Compare accounts.mode off, count, enforce and off again, interleaved. The exit code says whether all succeeded.

    Parameters
    ----------
    json
        where the numbers go
    sets
        further settings of `baton up`; may be repeated
    """
    made = finish(_measured(spec, sets))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
    print(text(made))
    return 1 if made["errors"] else 0
