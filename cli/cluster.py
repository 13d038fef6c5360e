"""`baton up`, `status`, `drain`, `flip`, `restart` and `explain`: a cluster on this machine, or on Ray."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from cli.settings import (
    NO_SOURCES,
    FrontGrpcPort,
    FrontHost,
    FrontPort,
    Given,
    KvTiers,
    Model,
    Sources,
    StateDir,
    check_engine,
    kv_tiers,
    load,
    setting,
    state_folder,
)

FLIP_ANSWER_S = 5.0
"""For the last messages of a change of role."""


def up(
    *,
    model: Model = None,
    prefill: Annotated[
        Given | None,
        setting("launcher.prefill", "number of prefill workers; 0: decode workers compute the prompts", "N"),
    ] = None,
    decode: Annotated[Given | None, setting("launcher.decode", "number of decode workers", "M")] = None,
    front_proxies: Annotated[
        Given | None, setting("launcher.front_proxies", "number of front proxies, all on one port", "N")
    ] = None,
    host: FrontHost = None,
    port: FrontPort = None,
    grpc_port: FrontGrpcPort = None,
    backend: Annotated[
        Given | None, setting("launcher.backend", "where processes run: local, this machine; ray", "B")
    ] = None,
    ray_address: Annotated[
        Given | None, setting("launcher.ray.address", "head of the Ray cluster (default: this machine's)", "HOST:PORT")
    ] = None,
    kv_tier: KvTiers = (),
    state_dir: StateDir = None,
    sources: Sources = NO_SOURCES,
) -> int:
    """Start a cluster, and serve until Ctrl-C."""
    from launcher.up import up as start

    tiers = kv_tiers(kv_tier)
    counts = (prefill, decode, front_proxies)
    loaded = load(sources, model, *counts, host, port, grpc_port, backend, ray_address, tiers, state_dir)
    check_engine(loaded, workers=loaded.value.launcher.prefill + loaded.value.launcher.decode)
    return start(loaded.value, loaded.sources)


def status(
    *,
    state_dir: StateDir = None,
    json: bool = False,
    sources: Sources = NO_SOURCES,
) -> None:
    """Show every process of a cluster.

    Parameters
    ----------
    json
        print JSON
    """
    from launcher.hosted import state_file
    from launcher.hosted.status import as_json, as_table, collect
    from launcher.hosted.timing import Timing

    config = load(sources, state_dir).value
    record = state_file.read(state_folder(config))
    lines = asyncio.run(collect(record, timeout_s=Timing().status_timeout_s))
    print(as_json(lines) if json else as_table(lines))


def drain(
    worker: str,
    /,
    *,
    state_dir: StateDir = None,
    timeout_s: Annotated[
        Given | None, setting("worker.drain_timeout_s", "how long to wait until it is idle", "S")
    ] = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Empty a worker: the scheduler sends it no new request, and it finishes those that it has.

    Returns when the worker is idle. Its process stays up, idle, until `baton restart WORKER` or the end of the cluster.

    Parameters
    ----------
    worker
        its id in `baton status`
    """
    from launcher.hosted import operator_commands

    config = load(sources, state_dir, timeout_s).value
    timeout = config.worker.drain_timeout_s
    asyncio.run(operator_commands.drain(state_folder(config), worker, timeout_s=timeout, say=_say))
    print(f"{worker} is idle; `baton restart {worker}` makes it take requests again")


def flip(
    worker: str,
    role: Literal["prefill", "decode"],
    /,
    *,
    state_dir: StateDir = None,
    timeout_s: Annotated[
        Given | None, setting("scheduler.flip_timeout_s", "how long to wait until it has the role", "S")
    ] = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Change the role of a worker in place: it finishes what it runs, and its engine and cache stay.

    Returns when it has the role. A worker that does not finish in scheduler.flip_timeout_s goes on in its old role, and
    the exit code is 1. The name stays; `baton status` shows the role.

    Parameters
    ----------
    worker
        its id in `baton status`
    role
        the role that it is to have
    """
    from launcher.hosted import operator_commands

    config = load(sources, state_dir, timeout_s).value
    timeout = config.scheduler.flip_timeout_s + FLIP_ANSWER_S
    asyncio.run(operator_commands.flip(state_folder(config), worker, role, timeout_s=timeout, say=_say))


def restart(
    process: str,
    /,
    *,
    state_dir: StateDir = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Restart a process of `baton up` without losing a request.

    Parameters
    ----------
    process
        an id in `baton status`, or all: every process, one after the other
    """
    from launcher.hosted import operator_commands

    asyncio.run(operator_commands.restart(state_folder(load(sources, state_dir).value), process, say=_say))


def explain(
    request_id: str,
    /,
    *,
    state_dir: StateDir = None,
    json: bool = False,
    sources: Sources = NO_SOURCES,
) -> None:
    """Show why a request ran where it did, and what became of it.

    The scheduler remembers its last 10,000 plans.

    Parameters
    ----------
    request_id
        X-Request-Id of its answer, the id in the answer's body, or GenerateRequest.request_id
    json
        print JSON
    """
    from launcher.hosted import operator_commands
    from launcher.hosted.explanation import as_json, as_text

    plans = asyncio.run(operator_commands.explain(state_folder(load(sources, state_dir).value), request_id)).plans
    print(as_json(plans) if json else as_text(plans))


def _say(line: str) -> None:
    print(line, flush=True)
