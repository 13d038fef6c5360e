"""The front proxy's picture of the cluster, as the scheduler last told it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState


class WorkerEntry(msgspec.Struct, frozen=True):
    """One worker incarnation and what it last reported."""

    info: WorkerInfo
    load: WorkerLoad
    unusable: str = ""
    """Why the scheduler does not use it, however ready it is; empty: it does."""

    @property
    def load_to_plan_by(self) -> WorkerLoad:
        """Its load, for planning without the scheduler. An unusable worker gets an empty one, so it is not chosen."""
        return WorkerLoad() if self.unusable else self.load


class ClusterSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The picture at one moment."""

    workers: tuple[WorkerEntry, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a request can be served: one ready decode worker suffices, since it can prefill itself."""
        return any(worker.info.role == "decode" and worker.load.state is WorkerState.READY for worker in self.workers)

    @property
    def context_tokens_max(self) -> int:
        """The longest prompt + output that every worker accepts; 0 while there is none."""
        limits = (worker.info.context_tokens_max for worker in self.workers)
        return min((limit for limit in limits if limit), default=0)

    @property
    def models(self) -> tuple[str, ...]:
        """What the workers serve, each once; one entry in a healthy cluster."""
        return tuple(dict.fromkeys(worker.info.model for worker in self.workers if worker.info.model))


class ViewChange(msgspec.Struct, frozen=True):
    """What a new picture said. ``told``: the entries that were taken over from it."""

    gone: Sequence[tuple[str, int]]
    told: Sequence[WorkerEntry]


class ClusterView:
    """Keeps the latest picture and tells what became of the incarnations it knew."""

    def __init__(self) -> None:
        self.snapshot = ClusterSnapshot()
        """The latest picture."""
        self.block_size_tokens = 0
        """Of all workers; 0 while there are none, or some with another one than others."""
        self.knows_more = False
        """Whether the scheduler of the last view is recovering and does not know all workers that are known here."""

    def apply(self, workers: Sequence[WorkerEntry], *, recovering: bool = False) -> ViewChange:
        """Take over a new picture.

        A scheduler that is ``recovering`` does not know all workers yet. A worker that it does not name, or does not
        know to be ready, stays as it was.
        """
        told = workers
        self.knows_more = False
        if recovering:
            known = {worker.info.worker_id: worker for worker in self.snapshot.workers}
            told = [worker for worker in workers if _says_more(worker, known.get(worker.info.worker_id))]
            back = {worker.info.worker_id for worker in told}
            self.knows_more = not known.keys() <= back
            stay = [worker for worker_id, worker in known.items() if worker_id not in back]
            workers = [*told, *stay]
        now = {(worker.info.worker_id, worker.info.epoch) for worker in workers}
        known_before = [(worker.info.worker_id, worker.info.epoch) for worker in self.snapshot.workers]
        self.snapshot = ClusterSnapshot(workers=tuple(workers))
        sizes = {worker.info.block_size_tokens for worker in workers}
        self.block_size_tokens = sizes.pop() if len(sizes) == 1 else 0
        return ViewChange([each for each in known_before if each not in now], told)


def _says_more(now: WorkerEntry, known: WorkerEntry | None) -> bool:
    """Whether an entry replaces the known one: not where a worker that was ready has only registered anew so far."""
    if known is None or known.info != now.info:
        return True
    return now.load.state is not WorkerState.STARTING or known.load.state is not WorkerState.READY
