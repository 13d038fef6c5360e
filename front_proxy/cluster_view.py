"""The front proxy's picture of the cluster, as the scheduler last told it. Pure: never asks anybody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

WorkerRole = Literal["prefill", "decode"]
WorkerState = Literal["starting", "ready", "draining", "stopped"]


class WorkerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One worker incarnation and what it last reported."""

    worker_id: str
    role: WorkerRole
    address: str
    epoch: int
    state: WorkerState
    model: str = ""
    engine_version: str = ""
    context_tokens_max: int = 0
    block_size_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    requests_running: int = 0
    requests_waiting: int = 0


class ClusterSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The picture at one moment. ``connected``: the scheduler is on the line, so it is current."""

    workers: tuple[WorkerEntry, ...] = ()
    connected: bool = False

    @property
    def usable(self) -> bool:
        """Whether a request can be served: one ready decode worker suffices, since it can prefill itself."""
        return any(worker.role == "decode" and worker.state == "ready" for worker in self.workers)

    @property
    def context_tokens_max(self) -> int:
        """The longest prompt + output that every worker accepts; 0 while there is none."""
        return min((worker.context_tokens_max for worker in self.workers if worker.context_tokens_max), default=0)

    @property
    def models(self) -> tuple[str, ...]:
        """What the workers serve, each once; one entry in a healthy cluster."""
        return tuple(dict.fromkeys(worker.model for worker in self.workers if worker.model))


class ClusterView:
    """Keeps the latest picture and tells what became of the incarnations it knew."""

    def __init__(self) -> None:
        self._snapshot = ClusterSnapshot()

    @property
    def snapshot(self) -> ClusterSnapshot:
        """The latest picture."""
        return self._snapshot

    def apply(self, workers: Sequence[WorkerEntry], *, rebuilding: bool = False) -> Sequence[tuple[str, int]]:
        """Take over a new picture; returns the (worker id, epoch) pairs that are not in it any more.

        A scheduler that is ``rebuilding`` does not know everybody yet: whom it does not name, or has not heard of
        being ready, stays as he was.
        """
        if rebuilding:
            known = {worker.worker_id: worker for worker in self._snapshot.workers}
            workers = [_as_known(worker, known.pop(worker.worker_id, None)) for worker in workers]
            workers = [*workers, *known.values()]
        now = {(worker.worker_id, worker.epoch) for worker in workers}
        gone = [
            (worker.worker_id, worker.epoch)
            for worker in self._snapshot.workers
            if (worker.worker_id, worker.epoch) not in now
        ]
        self._snapshot = ClusterSnapshot(workers=tuple(workers), connected=True)
        return gone

    def disconnected(self) -> None:
        """The scheduler is away: the picture stays, marked as old."""
        self._snapshot = msgspec.structs.replace(self._snapshot, connected=False)


def _as_known(now: WorkerEntry, known: WorkerEntry | None) -> WorkerEntry:
    """A worker that has registered anew and not reported yet is what it was, if it is the same incarnation."""
    same = known is not None and known.epoch == now.epoch
    return known if same and known is not None and now.state == "starting" else now
