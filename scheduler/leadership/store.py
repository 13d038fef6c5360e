"""Which store says which scheduler leads, as the configuration says."""

from __future__ import annotations

from pathlib import Path

from runtime.timing.clock import Clock
from scheduler.config import SchedulerConfig
from scheduler.leadership.file_lock import FileLock
from scheduler.leadership.rules import Leadership


def leadership_of(config: SchedulerConfig, address: str, clock: Clock) -> Leadership | None:
    """This process's claim to lead, reachable at ``address``; None where it is the only scheduler.

    Raises BadConfiguration.
    """
    if config.alone:
        return None
    if config.leader_store == "file":
        return FileLock(Path(config.leader_lock_file))
    # Here, since other schedulers do without the client of Kubernetes.
    from scheduler.leadership.kubernetes import KubernetesLease, kube_config

    return KubernetesLease(
        kube_config(),
        namespace=config.kubernetes.namespace,
        name=config.kubernetes.lease_name,
        lease_s=config.kubernetes.lease_duration_s,
        address=address,
        clock=clock,
    )
