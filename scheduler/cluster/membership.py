"""Who may join the cluster, and whether it can be heard at all. Says so; changes nothing."""

from __future__ import annotations

from scheduler.api.worker_info import WorkerInfo
from scheduler.cluster.state import ClusterState


def is_isolated(cluster: ClusterState) -> bool:
    """Whether nobody of several is heard. Then it is the scheduler that is cut off, and nobody is given up for it."""
    workers = cluster.workers.values()
    return len(workers) > 1 and all(worker.silent for worker in workers)


def objection(info: WorkerInfo, cluster: ClusterState, workers_max: int) -> str | None:
    """Why a worker may not join, as a sentence; None when it may."""
    name = info.worker_id
    if not name or info.epoch <= 0 or info.block_size_tokens <= 0 or info.kv_blocks_total <= 0:
        return f"Worker {name!r} must state its id, epoch, block size and number of KV blocks."
    former = cluster.get(name)
    if former is not None and former.info.epoch > info.epoch:
        return f"A newer start of worker {name} is registered; every worker needs a worker_id of its own."
    if former is not None and former.info.epoch == info.epoch and former.info != info:
        return f"Worker {name} changed its info without a new epoch."
    if former is None and len(cluster.workers) >= workers_max:
        return f"The scheduler accepts at most {workers_max} workers (scheduler.workers_max)."
    # All members agree with one another, so any one of them speaks for the cluster.
    member = next(iter(cluster.others(name)), None)
    if member is None:
        return None
    for what, own, theirs in (
        ("engine version", info.engine_version, member.info.engine_version),
        ("model", info.model, member.info.model),
        ("KV layout", info.layout_fingerprint, member.info.layout_fingerprint),
    ):
        if own != theirs:
            return f"Worker {name} has {what} {own!r}, but {member.worker_id} is registered with {theirs!r}."
    return None
