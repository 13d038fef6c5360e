"""The registered workers, by id and by the pool of their model. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from scheduler.api.worker_info import WorkerInfo
from scheduler.cluster import learnt_profile
from scheduler.cluster.decode_pace import OutputLengths
from scheduler.cluster.latency_model import LatencyModel, LearntLaw
from scheduler.cluster.latency_profile import ASSUMED, LatencyProfile
from scheduler.cluster.model_pool import ModelPool, PoolKey
from scheduler.cluster.worker import Worker

_NO_POOL = ModelPool()
LAWS_MAX = 8
"""Pools that it is remembered of how fast they are."""


class ClusterState:
    """``membership`` lets one pool in at a time today, so there is one entry; nothing below depends on that."""

    def __init__(self, profile: LatencyProfile = ASSUMED) -> None:
        self.lengths = OutputLengths()
        self._profile = profile
        # Of pools whose workers are all gone too: they may return.
        self._laws: dict[PoolKey, LearntLaw] = {}
        self._workers: dict[str, Worker] = {}
        # A pool exists while it has a worker.
        self._pools: dict[PoolKey, ModelPool] = {}
        self.decode_left_s = float("-inf")
        """When a decode worker's stream ended last."""
        self.start_s = 0.0
        """How long the worker that registered last took to start. 0: none has said so."""

    @property
    def workers(self) -> Mapping[str, Worker]:
        """Read-only, by worker id."""
        return MappingProxyType(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        """The registered incarnation of a worker."""
        return self._workers.get(worker_id)

    def pool_of(self, worker: Worker) -> ModelPool:
        """The pool of a registered worker."""
        return self._pools[PoolKey.of(worker.info)]

    def pool_for_requests(self) -> ModelPool:
        """The pool whose workers take a request; empty without workers. Requests name no model yet: there is one."""
        return next(iter(self._pools.values()), _NO_POOL)

    def latency_of(self, info: WorkerInfo) -> LatencyModel:
        """A model for a new worker, which knows what the others of its pool taught."""
        key = PoolKey.of(info)
        law = self._laws.pop(key, None) or LearntLaw(self._profile)
        self._laws[key] = law
        if len(self._laws) > LAWS_MAX:
            del self._laws[next(iter(self._laws))]
        return LatencyModel(law)

    def learnt(self) -> LatencyProfile | None:
        """How fast workers showed to be; None before they did."""
        return learnt_profile.profile_of(list(self._workers.values()), self._profile)

    def add(self, worker: Worker) -> None:
        """Register. An older incarnation must have been removed before."""
        assert worker.worker_id not in self._workers, worker.worker_id
        self._workers[worker.worker_id] = worker
        self._pools.setdefault(PoolKey.of(worker.info), ModelPool()).add(worker)
        self.start_s = worker.info.start_s or self.start_s

    def remove(self, worker_id: str) -> Worker:
        """Forget a worker; its reservations go with it."""
        worker = self._workers.pop(worker_id)
        key = PoolKey.of(worker.info)
        self._pools[key].remove(worker)
        if not self._pools[key]:
            del self._pools[key]
        return worker

    def forgive(self, late_s: float, now_s: float) -> None:
        """The scheduler itself stood still for so long: that is no worker's silence."""
        for worker in self._workers.values():
            worker.forgive(late_s, now_s)

    def look(self, silence_timeout_s: float, now_s: float) -> bool:
        """Note which workers fell silent and which ejections are over. True when anything changed."""
        changed = False
        for worker in self._workers.values():
            if not worker.silent and worker.heard_s + silence_timeout_s <= now_s:
                worker.fall_silent()
                changed = True
            if worker.health.look(now_s):
                worker.judge()
                changed = True
        return changed

    def check(self) -> None:
        """Assert that the pools hold the workers."""
        for worker_id, worker in self._workers.items():
            assert worker_id == worker.worker_id
            assert set(worker.ranks) <= set(self.pool_of(worker).with_role(worker.role))
            worker.check()
        ranks = sum(len(worker.ranks) for worker in self._workers.values())
        assert sum(len(pool) for pool in self._pools.values()) == ranks
        assert all(len(pool) for pool in self._pools.values())
