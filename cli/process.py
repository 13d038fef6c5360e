"""`baton scheduler`, `prefill`, `decode` and `front-proxy`: one process of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from cli.settings import (
    NO_SOURCES,
    FrontGrpcPort,
    FrontHost,
    FrontPort,
    Given,
    KvTiers,
    Model,
    Sources,
    check_engine,
    kv_tiers,
    load,
    setting,
)

if TYPE_CHECKING:
    from launcher.config import BatonConfig
    from runtime.configuration import Loaded
    from runtime.roles import Role


def scheduler(
    *,
    host: Annotated[Given | None, setting("scheduler.host", "address to listen on", "H")] = None,
    port: Annotated[Given | None, setting("scheduler.port", "gRPC port", "P")] = None,
    sources: Sources = NO_SOURCES,
) -> int:
    """Run one scheduler."""
    from launcher.run_process import serve

    return serve("scheduler", load(sources, host, port).value)


_WorkerId = Annotated[Given | None, setting("worker.worker_id", "name of this worker, unique in the cluster", "ID")]


def _worker(role: Role) -> Callable[..., int]:
    """The command of one kind of worker."""

    def run(
        *,
        model: Model = None,
        id: _WorkerId = None,  # noqa: A002 - the option's name
        host: Annotated[Given | None, setting("worker.host", "address to listen on", "H")] = None,
        port: Annotated[Given | None, setting("worker.port", "gRPC port", "P")] = None,
        scheduler: Annotated[
            Given | None,
            setting("worker.scheduler_address", "address of the scheduler; of two, with a comma", "HOST:PORT"),
        ] = None,
        kv_tier: KvTiers = (),
        sources: Sources = NO_SOURCES,
    ) -> int:
        loaded = load(sources, model, id, host, port, scheduler, kv_tiers(kv_tier))
        return _serve(role, loaded, "worker", loaded.value.worker.scheduler_address)

    run.__name__, run.__doc__ = role, f"Run one {role} worker."
    return run


prefill = _worker("prefill")
decode = _worker("decode")


def front_proxy(
    *,
    model: Annotated[
        Given | None,
        setting("engine.model", "the workers' model, for its tokenizer (default: a small demo model)", "MODEL"),
    ] = None,
    host: FrontHost = None,
    port: FrontPort = None,
    grpc_port: FrontGrpcPort = None,
    scheduler: Annotated[
        Given | None,
        setting("front_proxy.scheduler_address", "address of the scheduler; of two, with a comma", "HOST:PORT"),
    ] = None,
    sources: Sources = NO_SOURCES,
) -> int:
    """Run one front proxy."""
    loaded = load(sources, model, host, port, grpc_port, scheduler)
    return _serve("front_proxy", loaded, "front_proxy", loaded.value.front_proxy.scheduler_address)


def engine_node(
    *,
    model: Model = None,
    id: Annotated[Given | None, setting("worker.worker_id", "name of the worker", "ID")] = None,  # noqa: A002
    sources: Sources = NO_SOURCES,
) -> int:
    """Run a worker's engine on one more node: set engine.args.nnodes, node_rank, master_addr and master_port."""
    from launcher.run_process import serve_engine_node
    from runtime.configuration import BadConfiguration, source_of

    loaded = load(sources, model, id)
    if not loaded.value.engine.args.get("node_rank"):
        why = "an engine's further nodes count from 1; node 0 is `baton prefill` or `baton decode`"
        raise BadConfiguration("engine.args.node_rank", why, source_of(loaded, "engine.args"))
    check_engine(loaded)
    return serve_engine_node(loaded.value)


def _serve(role: Role, loaded: Loaded[BatonConfig], section: str, scheduler_address: str) -> int:
    from launcher import model_choice
    from launcher.hosted.processes import tell
    from launcher.run_process import serve
    from runtime.configuration import BadConfiguration, source_of

    if not scheduler_address:
        path = f"{section}.scheduler_address"
        raise BadConfiguration(path, "needs the scheduler's HOST:PORT (--scheduler)", source_of(loaded, path))
    check_engine(loaded)
    return serve(role, model_choice.choose(loaded.value, loaded.sources, os.environ, tell))
