"""Changes of role in place: which may begin, which go on, and which role is wanted of each worker. Pure.

A worker keeps its engine, weights and prefix cache. It finishes what it runs, and registers again in the other role,
with the next registration; or as before, if that took too long. A worker that is started again begins in the role
of its start, so the wanted role is kept here, by id. A new scheduler takes what workers say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from runtime.roles import WorkerRole
from scheduler.api.actions import FlipWorker
from scheduler.api.worker_info import WorkerState
from scheduler.cluster.worker import Worker


class RoleFlips:
    """Of one scheduler."""

    def __init__(self, timeout_s: float, answer_s: float, workers_max: int) -> None:
        self._timeout_s, self._answer_s, self._workers_max = timeout_s, answer_s, workers_max
        self.wanted: dict[str, WorkerRole] = {}
        """By worker id, the role that was asked for and not given up."""
        # Those that go on, and when they are given up.
        self._until_s: dict[str, float] = {}

    def objection(self, worker: Worker, role: WorkerRole, workers: Iterable[Worker]) -> str | None:
        """Why the worker must not take this role now, as a sentence; None when it may, or has it."""
        name = worker.worker_id
        if role == worker.role:
            return None
        if worker.flipping:
            return f"{name} changes its role already."
        if worker.drain_asked or worker.load.state is not WorkerState.READY:
            return f"{name} is {worker.state}: only a worker that is ready changes its role."
        others = (each for each in workers if each is not worker and each.role == "decode" and each.ready)
        if worker.role == "decode" and next(others, None) is None:
            return f"{name} is the last decode worker that is ready: without it no request could be served."
        return None

    def begin(self, worker: Worker, role: WorkerRole, now_s: float) -> Sequence[FlipWorker]:
        """Tell the worker. There is no objection."""
        self.wanted.pop(worker.worker_id, None)
        self.wanted[worker.worker_id] = role
        if len(self.wanted) > self._workers_max:
            del self.wanted[next(iter(self.wanted))]
        if role == worker.role:
            return ()
        self._until_s[worker.worker_id] = now_s + self._timeout_s + self._answer_s
        worker.flip(going_on=True)
        return (self._command(worker, role),)

    def joined(self, worker: Worker, workers: Iterable[Worker], now_s: float, *, ended: bool) -> Sequence[FlipWorker]:
        """A worker registered. ``ended``: a change of role ended so, perhaps in the old role."""
        name = worker.worker_id
        wanted = self.wanted.get(name)
        if ended:
            self._until_s.pop(name, None)
            worker.flip(going_on=False)
            if wanted != worker.role:
                # It took too long, and is not tried again by itself.
                self.wanted.pop(name, None)
            return ()
        if wanted is None or wanted == worker.role:
            return ()
        if worker.flipping:
            # Its former stream may have ended before it was told.
            return (self._command(worker, wanted),)
        return () if self._early_objection(worker, wanted, workers) else self.begin(worker, wanted, now_s)

    def overdue(self, now_s: float) -> Sequence[str]:
        """Workers that did not answer; what was wanted of them is given up."""
        late = [name for name, until_s in self._until_s.items() if until_s <= now_s]
        for name in late:
            del self._until_s[name]
            self.wanted.pop(name, None)
        return late

    def _early_objection(self, worker: Worker, role: WorkerRole, workers: Iterable[Worker]) -> bool:
        """Of one that has not reported its state yet: it just started, and is told to change at once."""
        decode = [each for each in workers if each is not worker and each.role == "decode" and not each.flipping]
        return worker.drain_asked or (worker.role == "decode" and role == "prefill" and not decode)

    def _command(self, worker: Worker, role: WorkerRole) -> FlipWorker:
        return FlipWorker(session=worker.session, worker_id=worker.worker_id, role=role, timeout_s=self._timeout_s)
