"""A scheduler process from its start to its end. Holds the order of things, no policy; imports nothing heavy."""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from accounts.config import AccountsConfig, AuthConfig
from runtime.configuration import BadConfiguration
from runtime.process import lifecycle
from runtime.process.exit_codes import ExitCode
from runtime.process.telemetry import Health, serve_metrics
from runtime.rpc.grpc_server import RunningServer, join_address, start_server
from runtime.rpc.status_service import StatusService
from runtime.timing.clock import Clock, SystemClock
from scheduler.accounting.accounting import accounting_of
from scheduler.cluster.latency_profile import ASSUMED, LatencyProfile, load
from scheduler.config import SchedulerConfig, SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.expert_metrics import ExpertMetrics
from scheduler.expert_service import ExpertService
from scheduler.leadership.file_lock import FileLock
from scheduler.leadership.rules import Leadership
from scheduler.metrics import SchedulerMetrics
from scheduler.service import add_services, status_service
from scheduler.shell import SchedulerShell

log = structlog.get_logger(__name__)

_NO_KEYS, _NO_ACCOUNTS = AuthConfig(), AccountsConfig()

Ready = Callable[[Mapping[str, str]], None]
MakeCore = Callable[[SchedulerConfig, Clock, LatencyProfile], SchedulerCore]


def new_core(config: SchedulerConfig, clock: Clock, profile: LatencyProfile) -> SchedulerCore:
    """A core that takes over now."""
    return SchedulerCore(config, rng=random.Random(), began_s=clock.monotonic_s(), profile=profile)


async def run(
    config: SchedulerConfig,
    ready: Ready,
    *,
    stop: asyncio.Event | None = None,
    metrics: SchedulerMetrics | None = None,
    make_core: MakeCore = new_core,
    auth: AuthConfig = _NO_KEYS,
    accounts: AccountsConfig = _NO_ACCOUNTS,
    model: str = "",
) -> None:
    """Serve until a signal; ``ready`` is told when workers and front proxies may connect.

    ``model``: the one that serves, which must have a price. ``make_core``: a benchmark records what its core is told.

    Raises SystemExit when the core broke an invariant, or when it led and leads no longer; UserError.
    """
    config = SchedulerParameters.of(config)
    stop = stop or lifecycle.stop_event()
    metrics = metrics or SchedulerMetrics()
    clock = SystemClock()
    next_core = functools.partial(make_core, config, clock, profile_of(config))
    shell = SchedulerShell(config, next_core(), clock, metrics)
    shell.stands_by = not config.alone
    await _keep_accounts(shell, auth, accounts, model)
    experts = ExpertService(shell, clock, ExpertMetrics(metrics.registry))
    status = status_service(shell, epoch=time.time_ns())
    health = Health()
    metrics_address = serve_metrics(config.host, config.metrics_port, health)
    server = await start_server(
        config.host,
        config.port,
        lambda server: (*add_services(shell, status, server), experts.add_to(server)),
        message_bytes_max=config.message_bytes_max,
    )
    status.address = join_address(config.advertise_host or config.host, config.advertise_port or server.port)
    leadership: Leadership | None = None
    leading: asyncio.Task[None] | None = None
    try:
        leadership = leadership_of(config, status.address, clock)
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(shell.tick(), name="tick")
            stopping = group.create_task(stop.wait(), name="stop")
            breaking = group.create_task(shell.broken.wait(), name="broken")
            parts: set[asyncio.Task[Any]] = {stopping, breaking, ticking}
            status.state = "standby" if leadership is not None else "ready"
            health.not_alive = functools.partial(_broken, shell)
            health.not_ready = functools.partial(_ended, shell, status)
            await server.set_serving(leadership is None)
            told = {"address": status.address, "grpc_address": status.address, "local_address": server.address}
            ready(told | {"metrics_address": metrics_address})
            log.info("scheduler is ready", address=status.address)
            if leadership is not None:
                leading = group.create_task(lead(leadership, shell, next_core, server, status), name="lead")
                parts.add(leading)
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for task in parts:
                task.cancel()
    finally:
        status.state = "stopped"
        experts.close()
        await _close(shell, leadership, server)
    if shell.broken.is_set():
        raise SystemExit(ExitCode.PART_DIED)
    if leading in done:
        raise SystemExit(ExitCode.LEADS_NO_LONGER)


def _broken(shell: SchedulerShell) -> str:
    return "an invariant of its state broke" if shell.broken.is_set() else ""


def _ended(shell: SchedulerShell, status: StatusService) -> str:
    """One that stands by is ready: a rolling update would wait for it for ever."""
    ends = status.state == "stopped" or shell.deposed
    return "it ends" if ends else _broken(shell)


async def _keep_accounts(shell: SchedulerShell, auth: AuthConfig, accounts: AccountsConfig, model: str) -> None:
    """Give the shell its keys and accounts; a scheduler that is alone takes the ledger over at once."""
    shell.accounting = accounting_of(
        auth, accounts, shell.reply, place=shell.feed, answer=shell.answer, lost=shell.broken, model=model
    )
    if shell.accounting is not None:
        shell.accounting.on_rules = shell.share
        if not shell.stands_by:
            await shell.accounting.open(0)
            shell.share()


async def _close(shell: SchedulerShell, leadership: Leadership | None, server: RunningServer) -> None:
    """End every stream, let go of the lead, and of the ledger last: what streams still told is written."""
    shell.close()
    if leadership is not None:
        # The next one may lead from here on, so nothing of what still comes in is decided.
        shell.leads_until_s = _never
        await leadership.release()
    await server.stop(shell.config.stop_grace_s)
    if shell.accounting is not None:
        await shell.accounting.close()


def leadership_of(config: SchedulerConfig, address: str, clock: Clock) -> Leadership | None:
    """This process's claim to lead, reachable at ``address``; None where it is the only scheduler.

    Raises BadConfiguration.
    """
    if config.alone:
        return None
    if config.leader_store == "file":
        return FileLock(Path(config.leader_lock_file))
    # Here, since other schedulers do without the client of Kubernetes.
    from scheduler.leadership.kubernetes import KubernetesLease, NoCluster, kube_config

    try:
        cluster = kube_config()
    except NoCluster as error:
        raise BadConfiguration("scheduler.leader_store", f"it is `kubernetes`, but {error}", "environment") from error
    return KubernetesLease(
        cluster,
        name=config.kubernetes.lease_name,
        lease_s=config.kubernetes.lease_duration_s,
        address=address,
        clock=clock,
    )


def profile_of(config: SchedulerConfig) -> LatencyProfile:
    """What predictions start from. Raises BadLatencyProfile."""
    return load(Path(config.latency_profile)) if config.latency_profile else ASSUMED


def _never() -> float:
    return float("-inf")


async def lead(
    leadership: Leadership,
    shell: SchedulerShell,
    make_core: Callable[[], SchedulerCore],
    server: RunningServer,
    status: StatusService,
) -> None:
    """Stand by, lead, and return when that is over: this process must not plan any more."""
    epoch = await leadership.acquire()
    if shell.accounting is not None:
        await shell.accounting.open(epoch)
    shell.lead(make_core(), epoch, lambda: leadership.until_s)
    status.state = "ready"
    await server.set_serving(True)
    log.warning("this scheduler leads", leader_epoch=epoch)
    why = await leadership.lost()
    log.critical("this scheduler leads no longer", leader_epoch=epoch, why=why)
