"""A worker whose engine is a group of data-parallel ranks: each is planned for by itself. Decides nothing.

What concerns the process is the group's: its stream, life and death, its role, its leases, its health. Each rank has a
part of the KV, a queue and a prefix cache of its own, so those are known, and predicted from, by rank.
"""

from __future__ import annotations

import msgspec

from scheduler.api.worker_info import WorkerInfo, WorkerLoad
from scheduler.cluster.latency_model import LatencyModel
from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.cluster.outlier_detector import WorkerHealth
from scheduler.cluster.worker import Worker


class WorkerGroup(Worker):
    """It holds no plan itself: its ranks do."""

    __slots__ = ()

    def __init__(
        self,
        info: WorkerInfo,
        session: int,
        now_s: float,
        latency: LatencyModel,
        profile: LatencyProfile,
        health: WorkerHealth,
    ) -> None:
        super().__init__(info, session, now_s, latency, profile, health)
        part = msgspec.structs.replace(
            info,
            kv_blocks_total=max(1, info.kv_blocks_total // info.ranks),
            requests_max=max(1, info.requests_max // info.ranks) if info.requests_max else 0,
        )
        self.ranks = tuple(
            [
                Worker(part, session, now_s, latency, profile, health, member=self, rank=rank)
                for rank in range(info.ranks)
            ]
        )

    def report(self, load: WorkerLoad, now_s: float, visible_after_s: float) -> None:
        """Take over a load report."""
        super().report(load, now_s, visible_after_s)
        for at, rank in enumerate(self.ranks):
            part = load.ranks[at] if at < len(load.ranks) else WorkerLoad(state=load.state)
            rank.report(part, now_s, visible_after_s)

    def judge(self) -> None:
        """Take over what its health says."""
        super().judge()
        for rank in self.ranks:
            rank.judge()

    def _refresh(self) -> None:
        super()._refresh()
        for rank in self.ranks:
            rank.follow(self)

    def check(self) -> None:
        """Assert that every sum is the sum of its parts."""
        super().check()
        assert not self.reserved and not len(self.prompts), self.worker_id
        for rank in self.ranks:
            assert (rank.ready, rank.avoided) == (self.ready, self.avoided), rank.target
            rank.check()


def joined(
    info: WorkerInfo,
    session: int,
    now_s: float,
    latency: LatencyModel,
    profile: LatencyProfile,
    health: WorkerHealth,
) -> Worker:
    """The worker that says this of itself."""
    kind = WorkerGroup if info.ranks > 1 else Worker
    return kind(info, session, now_s, latency, profile, health)
