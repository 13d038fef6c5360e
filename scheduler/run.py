"""A scheduler process from its start to its end. Holds the order of things, no policy; imports nothing heavy."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping

from runtime import lifecycle
from runtime.clock import SystemClock
from runtime.grpc_server import join_address, start_server
from runtime.telemetry import serve_metrics
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from scheduler.metrics import PolicyProbe, SchedulerMetrics
from scheduler.service import StatusService, add_services
from scheduler.shell import SchedulerShell

log = logging.getLogger("baton.scheduler.run")

Ready = Callable[[Mapping[str, str]], None]
EXIT_BROKEN = 3


async def run(
    config: SchedulerConfig,
    ready: Ready,
    *,
    stop: asyncio.Event | None = None,
    metrics: SchedulerMetrics | None = None,
) -> None:
    """Serve until a signal; ``ready`` is told when workers and front proxies may connect.

    Raises SystemExit when the core broke an invariant: the log has its story.
    """
    stop = stop or lifecycle.stop_event()
    metrics = metrics or SchedulerMetrics()
    clock = SystemClock()
    core = SchedulerCore(config, rng=random.Random(), probe=PolicyProbe(metrics), began_s=clock.monotonic_s())
    shell = SchedulerShell(config, core, clock, metrics)
    status = StatusService(shell, epoch=time.time_ns())
    metrics_address = serve_metrics(config.host, config.metrics_port)
    server = await start_server(
        config.host,
        config.port,
        lambda server: add_services(shell, status, server),
        message_bytes_max=config.message_bytes_max,
    )
    status.address = join_address(config.advertise_host or config.host, server.port)
    try:
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(shell.tick(), name="tick")
            stopping = group.create_task(stop.wait(), name="stop")
            breaking = group.create_task(shell.broken.wait(), name="broken")
            status.state = "ready"
            await server.set_serving(True)
            ready({"address": status.address, "grpc_address": status.address, "metrics_address": metrics_address})
            log.info("scheduler is ready at %s", status.address)
            await asyncio.wait({stopping, breaking, ticking}, return_when=asyncio.FIRST_COMPLETED)
            for task in (ticking, stopping, breaking):
                task.cancel()
    finally:
        status.state = "stopped"
        shell.close()
        await server.stop(config.stop_grace_s)
    if shell.broken.is_set():
        raise SystemExit(EXIT_BROKEN)
