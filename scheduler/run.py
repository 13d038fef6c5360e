"""A scheduler process from its start to its end. Holds the order of things, no policy; imports nothing heavy."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from runtime import lifecycle
from runtime.clock import Clock, SystemClock
from runtime.grpc_server import RunningServer, join_address, start_server
from runtime.telemetry import serve_metrics
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from scheduler.exit_codes import EXIT_BROKEN, EXIT_NOT_LEADER
from scheduler.kubernetes_api import in_cluster, namespace_of
from scheduler.leadership import LeaderLease
from scheduler.leadership_file import FileLease
from scheduler.leadership_kubernetes import KubernetesLease
from scheduler.leading import demand_persists, lead, stand_by
from scheduler.metrics import PolicyProbe, SchedulerMetrics
from scheduler.service import StatusService, add_services
from scheduler.shell import SchedulerShell

log = structlog.get_logger(__name__)

Ready = Callable[[Mapping[str, str]], None]


async def run(
    config: SchedulerConfig,
    ready: Ready,
    *,
    stop: asyncio.Event | None = None,
    metrics: SchedulerMetrics | None = None,
) -> None:
    """Serve until a signal; ``ready`` is told when workers and front proxies may connect.

    Raises SystemExit when the core broke an invariant, of which the log has the story, or when another one leads.
    """
    stop = stop or lifecycle.stop_event()
    metrics = metrics or SchedulerMetrics()
    clock = SystemClock()
    make_core = functools.partial(_core, config, clock, metrics)
    shell = SchedulerShell(config, make_core(), clock, metrics)
    lease = _lease(config, clock)
    if lease is not None:
        shell.stands_by_for = ""
    status = StatusService(shell, epoch=time.time_ns())
    metrics_address = serve_metrics(config.host, config.metrics_port)
    server = await start_server(
        config.host,
        config.port,
        lambda server: add_services(shell, status, server),
        message_bytes_max=config.message_bytes_max,
    )
    status.address = join_address(config.advertise_host or config.host, config.advertise_port or server.port)
    try:
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(shell.tick(), name="tick")
            stopping = group.create_task(stop.wait(), name="stop")
            breaking = group.create_task(shell.broken.wait(), name="broken")
            status.state = "standby" if lease is not None else "ready"
            await server.set_serving(lease is None)
            ready({"address": status.address, "grpc_address": status.address, "metrics_address": metrics_address})
            log.info("scheduler is ready", address=status.address)
            parts = {stopping, breaking, ticking}
            if lease is not None:
                parts.add(group.create_task(_lead(config, lease, shell, make_core, clock, server, status), name="lead"))
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            lost = not done <= {stopping, breaking, ticking}
            for task in parts:
                task.cancel()
    finally:
        status.state = "stopped"
        shell.close()
        if lease is not None:
            # The next one may lead from here on, so nothing of what still comes in is decided.
            shell.leads_until_s = float("-inf")
            await lease.release()
        await server.stop(config.stop_grace_s)
    if shell.broken.is_set():
        raise SystemExit(EXIT_BROKEN)
    if lost:
        raise SystemExit(EXIT_NOT_LEADER)


def _core(
    config: SchedulerConfig, clock: Clock, metrics: SchedulerMetrics, *, rebuild_longer: bool = False
) -> SchedulerCore:
    probe = PolicyProbe(metrics)
    return SchedulerCore(
        config, rng=random.Random(), probe=probe, began_s=clock.monotonic_s(), rebuild_longer=rebuild_longer
    )


def _lease(config: SchedulerConfig, clock: Clock) -> LeaderLease | None:
    """Where several share the lead; None where this one is alone."""
    if config.alone:
        return None
    if config.leader_store == "file":
        return FileLease(Path(config.leader_lease_file), lease_s=config.leader_lease_s, clock=clock)
    return KubernetesLease(
        in_cluster(config.kubernetes, os.environ),
        namespace=namespace_of(config.kubernetes),
        name=config.kubernetes.lease_name,
        lease_s=config.leader_lease_s,
        clock=clock,
    )


async def _lead(
    config: SchedulerConfig,
    lease: LeaderLease,
    shell: SchedulerShell,
    make_core: Callable[..., SchedulerCore],
    clock: Clock,
    server: RunningServer,
    status: StatusService,
) -> None:
    """Stand by until nobody else leads, lead, and return when that is over: this process must not plan any more."""
    epoch = await stand_by(config, lease, shell, status.address)
    rebuild_longer = demand_persists(config, shell, clock.monotonic_s())
    shell.lead(make_core(rebuild_longer=rebuild_longer), epoch)
    shell.leads_until_s = lease.until_s
    status.state = "ready"
    await server.set_serving(True)
    log.warning("this scheduler leads", leader_epoch=epoch, rebuild_longer=rebuild_longer)
    why = await lead(config, lease, shell, clock)
    log.critical("this scheduler leads no longer", leader_epoch=epoch, why=why)
