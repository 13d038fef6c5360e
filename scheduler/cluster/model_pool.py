"""Workers that can serve one model together: the same model and KV layout, so any two of them may exchange KV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from runtime.roles import WORKER_ROLES, WorkerRole
from scheduler.api.worker_info import WorkerInfo
from scheduler.cluster.worker import Worker


class PoolKey(NamedTuple):
    """What workers must agree on to be of one pool."""

    model: str
    layout_fingerprint: str

    @classmethod
    def of(cls, info: WorkerInfo) -> PoolKey:
        """The pool that a worker belongs to."""
        return cls(info.model, info.layout_fingerprint)


class ModelPool:
    """The registered workers of one pool by role, in order of arrival: of each all that can be planned for.

    A worker with several data-parallel ranks is each of these. Chooses none.
    """

    def __init__(self) -> None:
        self._by_role: dict[WorkerRole, list[Worker]] = {role: [] for role in WORKER_ROLES}
        self._by_target: dict[WorkerRole, dict[str, Worker]] = {role: {} for role in WORKER_ROLES}

    def __len__(self) -> int:
        return sum(len(workers) for workers in self._by_role.values())

    def with_role(self, role: WorkerRole) -> list[Worker]:
        """The workers of one role. The caller must not change the list."""
        return self._by_role[role]

    def named(self, role: WorkerRole) -> Mapping[str, Worker]:
        """The same by what the prefix index calls them."""
        return self._by_target[role]

    def add(self, worker: Worker) -> None:
        """Take a worker in."""
        for rank in worker.ranks:
            self._by_role[worker.role].append(rank)
            self._by_target[worker.role][rank.target] = rank

    def remove(self, worker: Worker) -> None:
        """Let a worker go."""
        for rank in worker.ranks:
            self._by_role[worker.role].remove(rank)
            del self._by_target[worker.role][rank.target]
