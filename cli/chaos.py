"""`baton chaos`: breaks a cluster under traffic, a real one or one in virtual time, and reports."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from chaos.requests import REQUEST_KINDS, RequestKind
from chaos.schedule import FAULT_KINDS, USERS, FaultKind, Lengths
from cli.settings import NO_SOURCES, Sources, load
from runtime.process import command_line
from runtime.roles import ROLES, Role

app = command_line.new_app("chaos", "Break a cluster under traffic, and check what clients saw.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The processes of a cluster, and its faults."""

    prefill: int = 1
    """number of prefill workers"""
    decode: int = 2
    """number of decode workers"""
    front_proxies: int = 2
    """number of front proxies"""
    seed: int = 0
    """seed of the prompts, and of the order and times of the faults"""
    faults: Annotated[Sequence[FaultKind], command_line.one_or_more_of(FAULT_KINDS, "kinds of fault", "KINDS")] = (
        "kill",
    )
    roles: Annotated[Sequence[Role], command_line.one_or_more_of(ROLES, "which processes", "ROLES")] = ROLES
    rounds: int = 1
    """how often each fault hits each process"""
    users: int = USERS
    """clients at once"""


_Lengths = Annotated[Lengths, Parameter(name="*")]
_PLAN, _LENGTHS = Plan(), Lengths()


@app.default
def real(
    *,
    model: str = "",
    plan: Plan = _PLAN,
    lengths: _Lengths = _LENGTHS,
    requests: Annotated[
        Sequence[RequestKind], command_line.one_or_more_of(REQUEST_KINDS, "kinds of request", "KINDS")
    ] = REQUEST_KINDS,
    recover_timeout_s: float = 240.0,
    state_dir: Path = Path(".baton-chaos"),
    output: Path | None = None,
    sources: Sources = NO_SOURCES,
) -> int:
    """Break a real cluster on this machine.

    The exit code is 0 if no request failed, no token was wrong, and no worker holds KV or a lease at the end; else 1.

    Parameters
    ----------
    model
        folder or hub name (default: the demo model)
    recover_timeout_s
        longest wait until the cluster is whole again after a fault
    state_dir
        folder for state and logs of the cluster
    output
        where the JSON report goes
    """
    from chaos import real_run
    from chaos.report import as_text
    from launcher.hosted import process_plan

    counts = (("prefill", plan.prefill), ("decode", plan.decode), ("front_proxies", plan.front_proxies))
    sets = [*(f"launcher.{name}={count}" for name, count in counts), *sources.sets]
    # As `baton up` will read it. A wrong setting fails here, before any process starts.
    config = load(Sources(config=sources.config, sets=sets)).value
    words = ["--model", model] if model else []
    words += ["--config", str(sources.config)] if sources.config else []
    words += [word for each in sets for word in ("--set", each)]
    options = real_run.ChaosOptions(
        state_dir=state_dir.expanduser().absolute(),
        up_arguments=tuple(words),
        specs=process_plan.plan(config),
        config=config,
        seed=plan.seed,
        kinds=tuple(plan.faults),
        roles=tuple(plan.roles),
        request_kinds=tuple(requests),
        rounds=plan.rounds,
        users=plan.users,
        lengths=lengths,
        recover_timeout_s=recover_timeout_s,
    )
    report = real_run.run(options, lambda line: print(line, file=sys.stderr, flush=True))
    if output is not None:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    print(as_text(report))
    return 0 if report.passed else 1


@app.command
def virtual(
    *,
    plan: Plan = _PLAN,
    lengths: _Lengths = _LENGTHS,
    schedulers: int = 1,
    seeds: int = 1,
    event_log: bool = False,
) -> int:
    """Break the production code in virtual time, by the same schedule.

    The exit code is 0 if no request failed and every invariant held; else 1.

    Parameters
    ----------
    schedulers
        number of schedulers
    seeds
        number of seeds to run, from --seed on
    event_log
        print every event
    """
    from chaos import virtual_run
    from simulation.faults.cluster import Topology
    from simulation.kernel import parallel

    options = virtual_run.ChaosOptions(
        topology=Topology(
            prefill=plan.prefill, decode=plan.decode, front_proxies=plan.front_proxies, schedulers=schedulers
        ),
        kinds=tuple(plan.faults),
        roles=tuple(plan.roles),
        rounds=plan.rounds,
        users=plan.users,
        lengths=lengths,
    )

    def tell(seed: int) -> int:
        verdict = virtual_run.run(seed, options, event_log=event_log)
        print("\n".join((*verdict.event_log, *virtual_run.told(verdict, virtual_run.planned(seed, options)))))
        return 0 if verdict.passed else 1

    if seeds == 1:
        return tell(plan.seed)
    requests = faults = repeated = 0
    for verdict in parallel.over(
        functools.partial(virtual_run.run, options=options), range(plan.seed, plan.seed + seeds)
    ):
        if not verdict.passed:
            return tell(verdict.seed)
        requests += verdict.counts.requests
        repeated += verdict.counts.repeated
        faults += verdict.faults
    print(f"{seeds} seeds passed: {faults} faults, {requests} requests, {repeated} repeated by their client")
    return 0
