"""A front proxy process from its start to its end. Holds the order of things; decides nothing about requests."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import structlog

from accounts.config import AccountsConfig, AuthConfig
from engine.config import EngineConfig
from front_proxy.config import LIMITS, FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch.accounts_link import AccountsLink
from front_proxy.dispatch.bills import Bills
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.gateway.access import OPEN, Access
from front_proxy.gateway.in_flight import InFlight
from front_proxy.gateway.key_gate import KeyGate
from front_proxy.grpc_api.server import GrpcServer
from front_proxy.grpc_api.service import InferenceService
from front_proxy.planning.key_watch import KeyWatch
from protos.cluster.v1 import cluster_pb2
from runtime.failures import FailureError
from runtime.process import lifecycle
from runtime.process.exit_codes import ExitCode
from runtime.process.telemetry import Health, serve_metrics
from runtime.rpc.status_service import StatusService
from scheduler.accounting.secrets_folder import pepper
from scheduler.config import SchedulerConfig

if TYPE_CHECKING:
    from front_proxy.build import VllmServing
    from front_proxy.openai_api.server import OpenAiServer

log = structlog.get_logger(__name__)

Ready = Callable[[Mapping[str, str]], None]


async def run(
    engine: EngineConfig,
    front: FrontProxyConfig,
    ready: Ready,
    *,
    stop: lifecycle.Stop | None = None,
    policy: SchedulerConfig | None = None,
    listener: socket.socket | None = None,
    status_port: int = 0,
    auth: AuthConfig | None = None,
    accounts: AccountsConfig | None = None,
) -> None:
    """Serve until a signal, then finish what runs; ``ready`` is told when the first request would succeed.

    ``policy`` are the scheduler's settings, for planning while it is away. ``listener`` is a bound socket to accept
    HTTP on, which outlives this process; without one ``front.port`` is bound. With a ``status_port`` this process
    shares its ports with other front proxies: see ``GrpcServer``.

    Raises SystemExit with an ExitCode when the process cannot go on; the log says why.
    """
    stop = stop or lifecycle.stop_event()
    health = Health()
    if front.metrics_port:
        serve_metrics(front.host, front.metrics_port, health)
    log.info("loading tokenizer and serving layer", model=engine.model)
    # In a thread, so that a signal is heard while libraries load.
    version = await asyncio.to_thread(_engine_version, engine)
    if stop.is_set():
        return
    access, link = _access(engine, auth or AuthConfig(), accounts or AccountsConfig())
    dispatcher = Dispatcher(front, engine_version=version, policy=policy, accounts=link)
    serving = await _load(engine, front, dispatcher, access)
    try:
        serving.http.bind(listener)
        async with asyncio.TaskGroup() as group:
            streams = group.create_task(dispatcher.run(), name="dispatcher")
            try:
                await _serve(front, dispatcher, serving, streams, version, ready, stop, status_port, access, health)
            finally:
                await dispatcher.close()
    finally:
        serving.client.shutdown()


def _engine_version(engine: EngineConfig) -> str:
    """Front proxies and workers must agree on it. Empty: not checked, since the fake engine renders nothing."""
    from front_proxy import build

    return "" if engine.kind == "fake" else build.engine_version()


def _access(engine: EngineConfig, auth: AuthConfig, accounts: AccountsConfig) -> tuple[Access, AccountsLink | None]:
    """What checks keys and counts usage, and what of it goes to the scheduler. Raises UserError."""
    if auth.mode == "off" and accounts.mode == "off":
        return OPEN, None
    model = engine.served_model_name or engine.model
    gate = watch = None
    if auth.mode == "required":
        secret = pepper(auth)
        watch = KeyWatch(pepper=secret, max_age_s=auth.keys_max_age_s)
        gate = KeyGate(
            watch,
            model=model,
            now_s=asyncio.get_running_loop().time,
            wall_s=time.time,
        )
    link = AccountsLink(watch, accounts)
    bills = Bills(model, link.record) if accounts.mode != "off" else None
    return Access(gate=gate, bills=bills), link


async def _load(
    engine: EngineConfig, front: FrontProxyConfig, dispatcher: Dispatcher, access: Access = OPEN
) -> VllmServing:
    from front_proxy import build
    from front_proxy.engine_client.vllm_config import BadServingOption

    try:
        return await build.build(engine, front, dispatcher, access)
    except BadServingOption as error:
        log.critical("a setting of serving is wrong", why=str(error))
        raise SystemExit(ExitCode.BAD_OPTION) from error


async def _serve(
    front: FrontProxyConfig,
    dispatcher: Dispatcher,
    serving: VllmServing,
    streams: asyncio.Task[None],
    version: str,
    ready: Ready,
    stop: lifecycle.Stop,
    status_port: int,
    access: Access,
    health: Health,
) -> None:
    http, in_flight = serving.http, serving.client.in_flight

    def snapshot() -> cluster_pb2.ProcessStatus:
        return cluster_pb2.ProcessStatus(requests_running=dispatcher.in_flight, leases_held=dispatcher.handoffs_held)

    status = StatusService(dispatcher.front_proxy_id, "front_proxy", time.time_ns(), snapshot)
    status.address = http.address
    # Also where no worker is left: requests wait here for a pool that starts again.
    health.not_ready = lambda: "" if status.state == "ready" else f"it is {status.state}"
    inference = InferenceService(serving.inference, in_flight, classes_allowed=front.classes_allowed, access=access)
    grpc_server = GrpcServer(front, inference, status, status_port)
    await grpc_server.listen()
    try:
        if await _cluster(dispatcher, version, streams, stop):
            serving.client.refresh_limits()
            # Only now: connections that wait from before this process shall find a cluster that serves.
            await http.start()
            status.state = "ready"
            await grpc_server.start()
            ready(
                {
                    "address": http.address,
                    "grpc_address": grpc_server.address,
                    "status_address": grpc_server.status_address,
                    "metrics_address": http.metrics_address,
                }
            )
            log.info("front proxy is ready", http=http.address, grpc=grpc_server.address)
            lost = await _first(stop, (streams, http.serving))
            if lost is not None:
                log.critical("a part ended on its own", part=lost.get_name())
                lost.result()
                raise SystemExit(ExitCode.PART_DIED)
    finally:
        status.state = "draining"
        await _leave(front, dispatcher, in_flight, http, grpc_server, stop.hurry)
        if access.bills is not None:
            access.bills.finish()
            await dispatcher.booked()
        status.state = "stopped"


async def _cluster(dispatcher: Dispatcher, version: str, streams: asyncio.Task[None], stop: asyncio.Event) -> bool:
    """Wait for workers that can serve; False when the process is to end instead."""
    waiting = asyncio.create_task(dispatcher.wait_usable(LIMITS.usable_timeout_s), name="usable")
    lost = await _first(stop, (waiting, streams))
    if lost is not waiting:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        if lost is not None:
            lost.result()
        return False
    try:
        waiting.result()
    except FailureError as error:
        log.critical("no cluster to serve", why=error.failure.message)
        raise SystemExit(ExitCode.NO_CLUSTER) from error
    others = sorted({worker.info.engine_version for worker in dispatcher.cluster().workers} - {version, ""})
    if version and others:
        log.critical("engine versions differ", own=version, workers=", ".join(others))
        raise SystemExit(ExitCode.VERSIONS_DIFFER)
    return True


async def _leave(
    front: FrontProxyConfig,
    dispatcher: Dispatcher,
    in_flight: InFlight,
    http: OpenAiServer,
    grpc_server: GrpcServer,
    hurry: asyncio.Event,
    limits: FrontProxyLimits = LIMITS,
) -> None:
    """Refuse what is new, finish what runs, then close: readiness goes first, so that balancers look elsewhere."""
    await grpc_server.retire()
    finishing = asyncio.create_task(_finish(in_flight, http, grpc_server), name="finish what runs")
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({finishing, hurried}, timeout=front.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in (finishing, hurried):
        await lifecycle.cancel_and_wait(task, limits.close_timeout_s)
    in_flight.draining = True
    if in_flight.count:
        log.warning("stopping with sequences unfinished", sequences=in_flight.count)
        # While their connections are open: a stream that is cut without a word looks like one that is complete.
        dispatcher.stop_runs()
    await asyncio.gather(http.stop(), grpc_server.stop())


async def _finish(in_flight: InFlight, http: OpenAiServer, grpc_server: GrpcServer) -> None:
    """Wait until nothing runs. What reached this process is served."""
    http.retire()
    log.info("finishing what runs", sequences=in_flight.count)
    await asyncio.gather(http.quiet(), grpc_server.quiet())
    in_flight.draining = True
    await in_flight.idle.wait()


async def _first(stop: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> asyncio.Task[None] | None:
    """Wait for ``stop`` (None) or the first task that ends."""
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        return next((task for task in tasks if task in done), None)
    finally:
        stopping.cancel()
