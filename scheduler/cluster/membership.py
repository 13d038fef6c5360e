"""Which worker may join the cluster, and whether the scheduler itself is cut off. Changes nothing."""

from __future__ import annotations

import msgspec

from scheduler.api.worker_info import WorkerInfo
from scheduler.cluster.model_pool import PoolKey
from scheduler.cluster.state import ClusterState
from scheduler.cluster.worker import Worker

POOLS_MAX = 1
"""Pools that the cluster may have: requests do not say which model they want yet."""


def is_isolated(cluster: ClusterState) -> bool:
    """Whether all of several workers are silent. Then the scheduler is cut off itself, and drops none of them."""
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
    if former is not None and former.info.epoch == info.epoch and not _same_engine(former.info, info):
        return f"Worker {name} changed what it says about itself without a new epoch."
    if former is None and len(cluster.workers) >= workers_max:
        return f"The scheduler accepts at most {workers_max} workers."
    return _pool_objection(info, cluster)


def _same_engine(former: WorkerInfo, info: WorkerInfo) -> bool:
    """Whether one worker says both, the latter after the former: its role may differ with a newer registration."""
    if info.registration <= former.registration:
        return info == former
    return info == msgspec.structs.replace(former, role=info.role, registration=info.registration)


def _pool_objection(info: WorkerInfo, cluster: ClusterState) -> str | None:
    """Why no pool takes it. Members of a pool agree with one another, so the first one speaks for its pool."""
    name = info.worker_id
    members: dict[PoolKey, Worker] = {}
    for worker in cluster.workers.values():
        if worker.worker_id != name:
            members.setdefault(PoolKey.of(worker.info), worker)
    own = members.get(PoolKey.of(info))
    if own is None and len(members) < POOLS_MAX:
        return _settings_objection(info, cluster)
    other = own or next(iter(members.values()))
    for what, said, theirs in (
        ("engine version", info.engine_version, other.info.engine_version),
        ("model", info.model, other.info.model),
        ("KV layout", info.layout_fingerprint, other.info.layout_fingerprint),
    ):
        if said != theirs:
            return f"Worker {name} has {what} {said!r}, but {other.worker_id} is registered with {theirs!r}."
    return _settings_objection(info, cluster)


def _settings_objection(info: WorkerInfo, cluster: ClusterState) -> str | None:
    """Why it would give other tokens than a worker of either role. A worker without settings agrees with all."""
    for worker in cluster.workers.values():
        theirs = worker.info.output_settings
        if worker.worker_id == info.worker_id or not theirs or not info.output_settings:
            continue
        if theirs != info.output_settings:
            differing = sorted(set(theirs.split()) ^ set(info.output_settings.split()))
            names = ", ".join(dict.fromkeys(each.partition("=")[0] for each in differing))
            return f"Worker {info.worker_id} has other engine settings than {worker.worker_id}: {names}."
    return None
