"""`baton simulate`: replays a trace over a simulated cluster, in virtual time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runtime.process.exit_codes import ExitCode
from runtime.user_error import UserError

if TYPE_CHECKING:
    from simulation.replay.traces import Trace

TraceFormat = Literal["mooncake", "azure", "timed_trace", "aiperf", "baton"]


class BadOption(UserError):
    """An option has a value that it cannot have."""

    exit_code = ExitCode.BAD_OPTION


def simulate(
    *,
    trace: str,
    prefill: int = 4,
    decode: int = 4,
    policy: str = "baton",
    profile: Path | None = None,
    load: float = 1.0,
    seed: int = 0,
    slo: str = "",
    format: TraceFormat | None = None,  # noqa: A002 - the option's name
    requests: int = 1000,
    json: bool = False,
) -> None:
    """Replay a trace over a simulated cluster, in virtual time.

    The table (or the JSON) is on stdout and the same for the same options; progress and real time are on stderr.

    Parameters
    ----------
    trace
        file, compressed if its name ends in .zst; or traffic to make: multi-turn, shared-prompt, agents, reasoning
        or summarisation
    prefill
        number of prefill workers
    decode
        number of decode workers
    policy
        what decides where requests run: baton (production's) or another system's, as in `python -m bench routing`
    profile
        what `baton profile` wrote, or a cluster model (default: bench/cluster_model.json of the installation)
    load
        how many times as fast as recorded requests come
    seed
        seed of all chance
    slo
        ttft=SECONDS,itl=SECONDS (default: TTFT 2 s, or 4 times the prefill on an idle worker where that is longer; ITL
        0.05 s)
    format
        format of the file (default: its first line tells)
    requests
        number of requests to make, one a second on average
    json
        print JSON
    """
    import msgspec

    import bench
    from bench.routing.runs import ALL_POLICIES
    from simulation.replay import report
    from simulation.replay.run import Replay, Scenario
    from simulation.sizing import profile_fit

    if policy not in ALL_POLICIES:
        raise BadOption(f"policy: {policy!r} is none of {', '.join(ALL_POLICIES)}")
    check_counts(("prefill", prefill, 0), ("decode", decode, 1), ("requests", requests, 1))
    if not 0 < load < float("inf"):
        raise BadOption(f"load: {load} is no positive number")
    model = profile_fit.read_model(profile or Path(bench.__file__).parent / "cluster_model.json")
    replayed = played(trace, format, requests, seed)
    scenario = Scenario(
        trace=replayed, model=model, prefill=prefill, decode=decode, load=load, seed=seed, slo=report.Slo.parse(slo)
    )
    replay = Replay(scenario, policy, ALL_POLICIES[policy])
    result = replay.run(_progress(len(replayed.arrivals)))
    told = f"{replay.spent.wall_s:.1f} s of real time, {replay.spent.decisions_per_s:.0f} decisions/s"
    print(f"{policy}: {told}", file=sys.stderr)
    print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode() if json else report.as_table(result))


def played(trace: str, form: TraceFormat | None, requests: int, seed: int = 0) -> Trace:
    """What a file holds, or so many requests of made traffic."""
    from simulation.replay import generators, traces

    if trace in generators.SHAPES:
        return generators.made(trace, requests, per_s=1.0, seed=seed)
    return traces.read(Path(trace), form)


def check_counts(*counts: tuple[str, int, int]) -> None:
    """Raise BadOption for a count that is less than it may be: its option, itself, the least."""
    for name, value, least in counts:
        if value < least:
            raise BadOption(f"{name}: {value} is less than {least}")


def _progress(requests: int) -> Callable[[float, int], None]:
    """Tell of every tenth of the requests."""
    told = 0

    def tell(now_s: float, over: int) -> None:
        nonlocal told
        if over * 10 // requests > told:
            told = over * 10 // requests
            print(f"{over} of {requests} requests are over after {now_s:.0f} s of virtual time", file=sys.stderr)

    return tell
