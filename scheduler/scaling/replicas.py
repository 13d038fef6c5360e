"""How many workers each role should have; something else starts and ends them (`scheduler.scaling.actuator`). Pure.

As many as the planner of roles counts, and one more than there are of a role for which requests wait and their queue
does not shrink. More are wanted at once. Fewer are wanted when they were not needed for as long as three workers take
to start, and never fewer than run requests. When all were there and nothing was asked for ``idle_s``, none of either
role is wanted, until a request waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from runtime.roles import WORKER_ROLES, WorkerRole
from scheduler.api.worker_info import WorkerState
from scheduler.cluster.worker import Worker
from scheduler.config import ScalingConfig
from scheduler.scaling.planner import ROOM, Decision

SHRINK_AFTER_STARTS = 3.0
"""A worker that is not needed is kept for so many times as long as one takes to start."""
SHRINK_AFTER_MIN_S = 30.0
"""And for so long at least, also where it starts in no time."""
SETTLE_S = 30.0
"""So long after it began to lead a scheduler wants nothing but a wake: its workers may not all be here."""
RETURN_S = 10.0
"""And no wake for so long: workers of its predecessor may be about to register."""
ROLES_KEPT_MAX = 4096


class PoolTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Workers of one role: how many are wanted and why. ``worker_ids``: those that there are; the first end first."""

    role: WorkerRole
    replicas: int
    reason: str
    worker_ids: tuple[str, ...]


_Need = tuple[int, str]
"""How many workers, and what for."""


class ReplicaPlanner:
    """Of one scheduler while it leads."""

    def __init__(self, config: ScalingConfig) -> None:
        self.desired: tuple[PoolTarget, ...] = ()
        """What is wanted. Empty: nothing is known yet."""
        self.awake = False
        """Whether workers are wanted at all. At first not known, and taken for no."""
        self._config = config
        self._least: Mapping[WorkerRole, int] = {"prefill": config.prefill_min, "decode": config.decode_min}
        self._began_s: float | None = None
        self._busy_s = 0.0
        self._waited_before = 0
        self._replicas: dict[WorkerRole, int] = dict.fromkeys(WORKER_ROLES, 0)
        # Of roles with more workers than are needed: since when, and the most that were needed since.
        self._surplus: dict[WorkerRole, tuple[float, int]] = {}
        self._role_of: dict[str, WorkerRole] = {}

    def wake(self, workers: Sequence[Worker], now_s: float) -> None:
        """A request came and no worker is wanted: begin with the fewest, or with those that are still here."""
        self._began_s = now_s if self._began_s is None else self._began_s
        if not self.desired and now_s < self._began_s + RETURN_S:
            return
        self.awake, self._busy_s, self._waited_before = True, now_s, 0
        present = self._present(workers)
        self._replicas = {role: max(least, present[role]) for role, least in self._least.items()}
        self._want(workers, dict.fromkeys(WORKER_ROLES, "a request waits, and no worker was wanted"))

    def look(
        self,
        workers: Sequence[Worker],
        planned: Decision | None,
        *,
        busy: bool,
        askable: bool,
        waiting: int,
        short_of: WorkerRole | None,
        start_s: float,
        now_s: float,
    ) -> None:
        """Count anew.

        ``busy``: something was asked since the last look, or runs. ``askable``: a front proxy is connected; without one
        it says nothing that nothing is asked. ``short_of``: the role whose workers have no room for the first of the
        ``waiting`` requests. ``start_s``: what a start takes.
        """
        self._began_s = now_s if self._began_s is None else self._began_s
        grew, self._waited_before = waiting >= self._waited_before > 0, waiting
        if not self.awake and (self.desired or not workers):
            if busy:
                self.wake(workers, now_s)
            return
        present = self._present(workers)
        # Those that start were wanted for a request that may come again: its client was told when.
        starting = any(present[role] < self._replicas[role] for role in WORKER_ROLES)
        if busy or starting or not askable or not self.awake:
            self.awake, self._busy_s = True, now_s
        if now_s < self._began_s + SETTLE_S:
            self._replicas = {role: max(had, present[role]) for role, had in self._replicas.items()}
            if not self.desired:
                if waiting and not present["decode"]:
                    self.wake(workers, now_s)
                return
        elif self._config.idle_s and self._busy_s + self._config.idle_s <= now_s:
            self._sleep(workers)
            return
        needs = self._needs(present, planned, short_of if grew else None)
        after_s = max(SHRINK_AFTER_MIN_S, SHRINK_AFTER_STARTS * start_s)
        reasons = {role: self._follow(role, needs[role], workers, after_s, now_s) for role in WORKER_ROLES}
        self._want(workers, reasons)

    def _sleep(self, workers: Sequence[Worker]) -> None:
        self.awake = False
        self._surplus.clear()
        self._replicas = dict.fromkeys(WORKER_ROLES, 0)
        self._want(workers, dict.fromkeys(WORKER_ROLES, f"nothing was asked for {self._config.idle_s:g} s"))

    def _present(self, workers: Sequence[Worker]) -> Mapping[WorkerRole, int]:
        """The workers that do not drain, by role. One that changed its role takes its place along."""
        for worker in workers:
            before = self._role_of.get(worker.worker_id, worker.role)
            if before != worker.role and self._replicas[before]:
                self._replicas[before] -= 1
                self._replicas[worker.role] += 1
        # Of those that left too: one that is started again begins in the role of its start.
        self._role_of |= {worker.worker_id: worker.role for worker in workers}
        for forgotten in list(self._role_of)[: max(0, len(self._role_of) - ROLES_KEPT_MAX)]:
            del self._role_of[forgotten]
        stay = [worker.role for worker in workers if worker.flipping or worker.state is not WorkerState.DRAINING]
        return {role: stay.count(role) for role in WORKER_ROLES}

    def _needs(
        self, present: Mapping[WorkerRole, int], planned: Decision | None, short_of: WorkerRole | None
    ) -> Mapping[WorkerRole, _Need]:
        config = self._config
        needs: dict[WorkerRole, _Need] = {}
        for role in WORKER_ROLES:
            told: list[_Need] = [(self._least[role], f"scheduler.scaling.{role}_min is {self._least[role]}")]
            if planned is None:
                told.append((present[role], "as many as there are: nothing is known of the traffic yet"))
            elif config.prefill_min or present["prefill"]:
                need = planned.prefill_need if role == "prefill" else planned.decode_need
                told.append((planned.wanted[role], f"the traffic needs {need:.2f} fully busy ones"))
            elif role == "decode":
                both = planned.prefill_need + planned.decode_need
                told.append((math.ceil(both / ROOM), f"the traffic, prompts too, needs {both:.2f} fully busy ones"))
            if role == short_of:
                told.append((present[role] + 1, "requests wait for these workers, and their queue does not shrink"))
            needs[role] = max(told, key=lambda each: each[0])
        return needs

    def _follow(self, role: WorkerRole, need: _Need, workers: Sequence[Worker], after_s: float, now_s: float) -> str:
        """More at once, fewer when that has been enough for ``after_s``. Returns the reason."""
        needed, reason = need
        had = self._replicas[role]
        if needed >= had:
            self._surplus.pop(role, None)
            self._replicas[role] = needed
            return reason
        since_s, most = self._surplus.get(role, (now_s, needed))
        self._surplus[role] = since_s, max(most, needed)
        if now_s < since_s + after_s:
            return f"{reason}; the others were needed within the last {after_s:.0f} s"
        running = sum(worker.role == role and _runs(worker) for worker in workers)
        self._replicas[role] = min(had, max(most, needed, running))
        if self._replicas[role] < had:
            del self._surplus[role]
            return reason
        return f"{reason}; the others run requests"

    def _want(self, workers: Sequence[Worker], reasons: Mapping[WorkerRole, str]) -> None:
        in_order = sorted(workers, key=_later_to_end)
        self.desired = tuple(
            PoolTarget(
                role=role,
                replicas=self._replicas[role],
                reason=reasons[role],
                worker_ids=tuple(worker.worker_id for worker in in_order if worker.role == role),
            )
            for role in WORKER_ROLES
        )


def _runs(worker: Worker) -> bool:
    """Whether it would have something to finish."""
    return worker.requests > 0 or worker.load.leases_held > 0


def _later_to_end(worker: Worker) -> tuple[bool, int, str]:
    """The busier, the later."""
    return worker.ready, worker.requests + worker.load.leases_held, worker.worker_id
