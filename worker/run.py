"""A worker process of either role, from the start of its engine to its end. Holds the order of steps, no policy."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import structlog

from engine import factory
from engine.config import EngineConfig
from engine.protocol import Engine, EngineDead
from kv_transfer.tiers.config import KvConfig, parse, size_text
from runtime.process import lifecycle
from runtime.process.exit_codes import ExitCode
from runtime.process.telemetry import Health, serve_metrics
from runtime.roles import WorkerRole
from runtime.rpc.grpc_server import RunningServer, join_address, start_server
from worker import service
from worker.config import WorkerConfig, WorkerLimits
from worker.core import WorkerCore
from worker.engine_health import EngineHealth
from worker.lifecycle import Event
from worker.metrics import WorkerMetrics
from worker.role import MakeRole
from worker.session import SchedulerSession

log = structlog.get_logger(__name__)

Ready = Callable[[Mapping[str, str]], None]


def worker_id_of(config: WorkerConfig, role: WorkerRole) -> str:
    """The configured name, or one that differs from other workers on this machine."""
    return config.worker_id or f"{role}-{os.getpid()}"


async def serve(
    role: WorkerRole,
    make_roles: Mapping[WorkerRole, MakeRole],
    engine_config: EngineConfig,
    config: WorkerConfig,
    ready: Ready,
    limits: WorkerLimits | None = None,
    kv: KvConfig | None = None,
) -> None:
    """Start an engine, serve ``role`` on it until a signal, then drain. Calls ``ready`` when requests may come.

    ``make_roles`` has both roles, or the only one that it can have.

    Raises SystemExit with an ExitCode when the process cannot go on. The log says why.
    """
    stop = lifecycle.stop_event()
    limits = limits or WorkerLimits()
    worker_id = worker_id_of(config, role)
    metrics = WorkerMetrics(role)
    log.info("starting the engine", worker=worker_id)
    health = Health()
    metrics_address = serve_metrics(config.host, config.metrics_port, health)
    tiers = parse((kv or KvConfig()).tiers)
    log.info("KV tiers", tiers=", ".join(f"{tier.kind} {size_text(tier.capacity_bytes)}" for tier in tiers) or "none")
    starting = factory.start(
        engine_config,
        worker_id=worker_id,
        role=role,
        host=config.host,
        advertise_host=config.advertise_host,
        tiers=tiers,
    )
    # Interpreter and imports.
    phases_s = {"python": lifecycle.age_s()}
    engine = await _start_engine(starting, stop)
    if engine is None:
        log.info("stopped before the engine was up")
        return
    phases_s["load"] = lifecycle.age_s() - phases_s["python"] - engine.info.warm_s
    phases_s["warm"] = engine.info.warm_s
    async with _closing(engine, limits):
        roles = {name: make(engine.info, worker_id) for name, make in make_roles.items()}
        core = WorkerCore(
            engine=engine,
            role=roles.pop(role),
            other_role=next(iter(roles.values()), None),
            config=config,
            worker_id=worker_id,
            metrics=metrics,
            limits=limits,
        )
        core.metrics_address, core.start_s = metrics_address, sum(phases_s.values())
        await _serve(core, stop, ready, health, phases_s)
        if core.engine_lost.is_set():
            raise SystemExit(ExitCode.ENGINE_STALLED if core.engine_stalled else ExitCode.PART_DIED)


async def _serve(
    core: WorkerCore, stop: lifecycle.Stop, ready: Ready, health: Health, phases_s: dict[str, float]
) -> None:
    """``phases_s``: what the start took so far, by phase."""
    config = core.config
    server = await start_server(
        config.host,
        config.port,
        lambda server: service.add_services(core, server),
        message_bytes_max=core.limits.message_bytes_max,
    )
    host = config.advertise_host or config.host
    core.address = join_address(host, config.advertise_port or server.port)
    session = SchedulerSession(core) if config.scheduler_address else None
    core.happen(Event.STARTED)
    health.not_alive = functools.partial(_why_not_alive, core)
    health.not_ready = functools.partial(_why_not_ready, core, session)
    try:
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(EngineHealth(core).run(), name="engine health"),
                group.create_task(core.watch_leases(), name="lease expiry"),
                group.create_task(core.watch_flips(), name="changes of role"),
                group.create_task(_follow_serving(core, server), name="gRPC health"),
            ]
            sessions = [group.create_task(session.run(), name="scheduler session")] if session else []
            if await _registered(session, core, stop):
                if session is not None:
                    await core.engine.join_experts(core.role.name, config.scheduler_address)
                phases_s["register"] = lifecycle.age_s() - core.start_s
                for phase, took_s in phases_s.items():
                    core.metrics.start_s.labels(phase).set(took_s)
                addresses = {"address": core.address, "grpc_address": core.address}
                start = ", ".join(f"{phase} {took_s:.1f} s" for phase, took_s in phases_s.items())
                ready({**addresses, "metrics_address": core.metrics_address, "start": start})
                log.info("worker is ready", worker=core.worker_id, address=core.address, start=start)
                await _first(stop, core.engine_lost)
            await _leave(core, session, sessions, stop.hurry)
            for task in loops:
                task.cancel()
    finally:
        await _stop(core, server)


async def _leave(
    core: WorkerCore, session: SchedulerSession | None, sessions: list[asyncio.Task[None]], hurry: asyncio.Event
) -> None:
    """Refuse new requests, finish running ones, release leases, say goodbye: in ``drain_timeout_s``, or in a hurry."""
    if not core.engine_lost.is_set():
        log.info("worker drains", worker=core.worker_id, requests=core.admission.requests, leases=len(core.role.leases))
        core.happen(Event.DRAIN_ASKED)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(core.config.drain_timeout_s):
                await _first(core.at_rest, hurry, core.engine_lost)
        if not core.idle:
            log.warning(
                "worker stops with work left",
                worker=core.worker_id,
                requests=core.admission.requests,
                leases=len(core.role.leases),
            )
            core.happen(Event.TIME_UP)
    if session is not None:
        session.leave(_why(core))
        _, late = await asyncio.wait(sessions, timeout=core.limits.stop_grace_s)
        for task in late:
            task.cancel()


def _why(core: WorkerCore) -> str:
    """The reason that the scheduler is given at the end."""
    if core.engine_stalled:
        return "engine stands still"
    return "engine died" if core.engine_lost.is_set() else "stopped"


def _why_not_alive(core: WorkerCore) -> str:
    return _why(core) if core.engine_lost.is_set() else ""


def _why_not_ready(core: WorkerCore, session: SchedulerSession | None) -> str:
    if core.engine_lost.is_set():
        return _why(core)
    if not core.lifecycle.accepts:
        return f"it is {core.lifecycle.state}"
    return "" if session is None or session.registered.is_set() else "it is not registered with the scheduler"


async def _stop(core: WorkerCore, server: RunningServer) -> None:
    limits = core.limits
    core.happen(Event.STOPPED)
    await server.stop(limits.stop_grace_s)
    if (left := await core.background.wait(limits.abort_timeout_s)) > 0:
        log.error("clean-up jobs did not end in time", jobs=left)
    core.apply(core.role.leases.holder_gone())


async def _registered(session: SchedulerSession | None, core: WorkerCore, stop: asyncio.Event) -> bool:
    """Wait until the scheduler has registered this worker. False when the process must end instead."""
    if session is not None:
        try:
            async with asyncio.timeout(core.limits.register_timeout_s):
                await _first(session.registered, stop, core.engine_lost)
        except TimeoutError as error:
            log.critical(
                "no scheduler registered this worker in time",
                address=core.config.scheduler_address,
                worker=core.worker_id,
                waited_s=core.limits.register_timeout_s,
            )
            raise SystemExit(ExitCode.NO_CLUSTER) from error
    return not (stop.is_set() or core.engine_lost.is_set())


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of ``events`` is set."""
    waiters = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()


async def _follow_serving(core: WorkerCore, server: RunningServer) -> None:
    """Keep grpc.health.v1 equal to the state of the core."""
    while True:
        await core.serving_flipped.wait()
        core.serving_flipped.clear()
        await server.set_serving(core.lifecycle.accepts)


async def _start_engine(starting: Awaitable[Engine], stop: asyncio.Event) -> Engine | None:
    """The engine, or None when the process is told to stop first. SystemExit when it does not start."""
    task = asyncio.ensure_future(starting)
    waiter = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    except EngineDead as error:
        log.critical("the engine did not start", why=str(error))
        raise SystemExit(ExitCode.PART_DIED) from error
    except ValueError as error:
        # What vLLM says of settings it does not take; its sentence names them.
        log.critical("the engine does not take its settings", why=str(error))
        raise SystemExit(ExitCode.BAD_OPTION) from error
    finally:
        waiter.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


@contextlib.asynccontextmanager
async def _closing(engine: Engine, limits: WorkerLimits) -> AsyncIterator[None]:
    """Close the engine on every way out, within ``engine_close_timeout_s``."""
    try:
        yield
    finally:
        try:
            async with asyncio.timeout(limits.engine_close_timeout_s):
                await engine.close()
        except TimeoutError:
            log.error("the engine did not close in time", waited_s=limits.engine_close_timeout_s)
