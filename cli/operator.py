"""`baton operator`: the process that gives pools of Kubernetes the size that the scheduler wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from cli.settings import NO_SOURCES, Given, Sources, load, setting

EXIT_TIMEOUT_S = 15.0


def operator(
    *,
    release: Annotated[str, Parameter(metavar="NAME")],
    pool: Annotated[Sequence[str], Parameter(metavar="NAME=ROLE:KIND:MAX")],
    scheduler: Annotated[
        Given | None,
        setting("worker.scheduler_address", "address of the scheduler; of two, with a comma", "HOST:PORT"),
    ] = None,
    host: str = "127.0.0.1",
    metrics_port: int = 0,
    sources: Sources = NO_SOURCES,
) -> int:
    """Give pools of Kubernetes the number of workers that the scheduler wants (scheduler.scaling.actuator=operator).

    Needs rights to get and update the pools' scale, to list and patch pods, and to a Lease. Several may run: one acts.

    Parameters
    ----------
    release
        the release of the chart
    pool
        a pool of the chart, its role, Deployment or LeaderWorkerSet, and its most replicas; may be repeated
    host
        address of /metrics, /livez and /readyz
    metrics_port
        their port; 0: any free one
    """
    from launcher.kubernetes import operator as following
    from launcher.kubernetes.run import run
    from runtime.configuration import BadConfiguration, source_of
    from runtime.process import lifecycle, logs
    from runtime.rpc import trust
    from scheduler.leadership.kubernetes import kube_config

    pools = following.parse(pool)
    loaded = load(sources, scheduler)
    config, path = loaded.value, "worker.scheduler_address"
    if not config.worker.scheduler_address:
        raise BadConfiguration(path, "needs the scheduler's HOST:PORT (--scheduler)", source_of(loaded, path))
    logs.configure_logging(config.scheduler.log_level, following.NAME)
    trust.use(config.tls)
    watch = following.from_scheduler(config.worker.scheduler_address)
    operating = run(kube_config(), release, pools, watch, host=host, metrics_port=metrics_port)
    lifecycle.run(operating, exit_timeout_s=EXIT_TIMEOUT_S)
    return 0
