"""`baton operator`, from its start to its end: one acts, by a Lease, and others stand by. Holds the order of things."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

import structlog
from lightkube import KubeConfig

from launcher.kubernetes.backend import KubernetesBackend, Target
from launcher.kubernetes.operator import Operator, ScaledPool, Watch
from runtime.process import lifecycle
from runtime.process.exit_codes import ExitCode
from runtime.process.telemetry import Health, serve_metrics
from runtime.roles import WorkerRole
from runtime.rpc import trust
from runtime.timing.clock import SystemClock
from scheduler.leadership.kubernetes import KubernetesLease

log = structlog.get_logger(__name__)

LEASE_S = 15.0
"""One that died is replaced after so long. What two wrote at once would be the same, by one scheduler's word."""


async def run(
    config: KubeConfig,
    release: str,
    pools: Mapping[WorkerRole, ScaledPool],
    watch: Watch,
    *,
    host: str = "127.0.0.1",
    metrics_port: int = 0,
    stop: lifecycle.Stop | None = None,
) -> None:
    """Act until a signal. Raises SystemExit where the Lease that it held is lost, and what the operator raises."""
    stop = stop or lifecycle.stop_event()
    targets = {pool.name: Target(kind=pool.kind, name=f"{release}-{pool.name}") for pool in pools.values()}
    backend = KubernetesBackend(config, release, targets)
    operator = Operator(backend, pools, watch)
    health = Health()
    metrics_address = serve_metrics(host, metrics_port, health)
    # One that stands by is ready: a rolling update would wait for it for ever.
    health.not_ready = lambda: operator.trouble
    lease = KubernetesLease(
        config, name=f"{release}-operator", lease_s=LEASE_S, address=socket.gethostname(), clock=SystemClock()
    )
    log.info("operator stands by", release=release, pools=", ".join(targets), metrics=metrics_address)
    acting = asyncio.create_task(_act(lease, operator), name="act")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    certificates = asyncio.create_task(trust.watch(), name="certificates")
    try:
        await asyncio.wait({acting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if acting.done():
            log.critical("the operator acts no longer", why=acting.result())
            raise SystemExit(ExitCode.LEADS_NO_LONGER)
    finally:
        for task in (acting, stopping, certificates):
            task.cancel()
        await asyncio.gather(acting, stopping, certificates, return_exceptions=True)
        await lease.release()
        await backend.close()


async def _act(lease: KubernetesLease, operator: Operator) -> str:
    """Wait for the Lease, then act until it is lost; returns why. Raises what the operator raises."""
    await lease.acquire()
    log.warning("this operator acts")
    acting = asyncio.create_task(operator.run(), name="follow the scheduler")
    losing = asyncio.create_task(lease.lost(), name="hold the Lease")
    try:
        await asyncio.wait({acting, losing}, return_when=asyncio.FIRST_COMPLETED)
        if acting.done():
            # By an error alone. A process that lives on would hold the Lease and do nothing.
            acting.result()
        return losing.result()
    finally:
        acting.cancel()
        losing.cancel()
        await asyncio.gather(acting, losing, return_exceptions=True)
