"""What a front proxy needs to plan without the scheduler: the last view, what runs, and the planner of an outage.

Says whether and how; when is ``scheduler_link``'s business.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from front_proxy.outage_planner import OutagePlanner
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2
from runtime.failures import Failure
from scheduler import wire as scheduler_wire
from scheduler.actions import ReplyPlan
from scheduler.config import SchedulerConfig
from scheduler.events import PlanRequested, RunningPlan

logger = logging.getLogger(__name__)


class DegradedPlans:
    """Time is an argument. ``on_plan`` is told "planned" or "refused" for every request planned here."""

    def __init__(
        self, policy: SchedulerConfig, *, view_max_age_s: float, load_fade_s: float, on_plan: Callable[[str], None]
    ) -> None:
        self.running: dict[int, RunningPlan] = {}
        """Every plan in flight, whoever made it."""
        self._policy = policy
        self._view_max_age_s = view_max_age_s
        self._load_fade_s = load_fade_s
        self._on_plan = on_plan
        self._entries: dict[str, scheduler_pb2.WorkerEntry] = {}
        self._true_s = float("-inf")
        self.knows_more = False
        """Whether a scheduler that is rebuilding does not know everybody that we know."""
        self._outage: OutagePlanner | None = None

    @property
    def active(self) -> bool:
        """Whether requests are planned here."""
        return self._outage is not None

    def see(self, view: scheduler_pb2.ClusterView, now_s: float) -> None:
        """Take over a view; the workers that one of a rebuilding scheduler leaves out stay known."""
        entries = {entry.info.worker_id: entry for entry in view.workers}
        self.knows_more = view.rebuilding and not all(
            _is_back(entries.get(worker_id), known) for worker_id, known in self._entries.items()
        )
        if not self.knows_more:
            self._entries, self._true_s = entries, now_s
            return
        # One that has registered anew and not reported yet is what it was, if it is the same incarnation.
        told = [entry for entry in entries.values() if _says_more(entry, self._entries.get(entry.info.worker_id))]
        self._entries.update({entry.info.worker_id: entry for entry in told})
        if self._outage is not None:
            fresh = scheduler_pb2.ClusterView(workers=told)
            self._outage.show(scheduler_wire.view_entries(fresh), now_s, now_s)

    def still_true(self, now_s: float) -> None:
        """The scheduler was there until now, so the last view was true until now."""
        self._true_s = now_s

    def fresh(self, now_s: float) -> bool:
        """Whether the last view is young enough to plan from."""
        return now_s - self._true_s <= self._view_max_age_s

    def plan(self, question: PlanRequested, why: str, now_s: float) -> RunningPlan | Failure:
        """Place a request; ``why`` the scheduler does not goes to the log, once for an outage."""
        if self._outage is None:
            self._outage = self._begin(why, now_s)
        reply = self._outage.plan(question, now_s)
        if not isinstance(reply, ReplyPlan):
            self._on_plan("refused")
            return reply.failure
        self._on_plan("planned")
        return RunningPlan(
            plan_id=reply.plan_id,
            request_id=question.request_id,
            prefill=reply.prefill,
            decode=reply.decode,
            decode_blocks=reply.decode_blocks_reserved,
        )

    def ended(self, plan_id: int, output_tokens: int, now_s: float) -> None:
        """A plan is over. Idempotent."""
        self.running.pop(plan_id, None)
        if self._outage is not None:
            self._outage.ended(plan_id, output_tokens, now_s)

    def suspect(self, worker_id: str, epoch: int, reason: str, now_s: float) -> None:
        """A worker could not be used."""
        if self._outage is not None:
            self._outage.suspect(worker_id, epoch, reason, now_s)

    def resume(self) -> None:
        """The scheduler plans again."""
        if self._outage is not None:
            logger.warning("the scheduler plans again", extra={"planned_without_it": self._outage.plans_made})
            self._outage = None

    def _begin(self, why: str, now_s: float) -> OutagePlanner:
        view_age_s = round(now_s - self._true_s, 3)
        logger.warning("planning without the scheduler", extra={"why": why, "view_age_s": view_age_s})
        outage = OutagePlanner(
            self._policy,
            running=self.running.values(),
            load_fade_s=self._load_fade_s,
            rng=random.Random(),
            now_s=now_s,
        )
        view = scheduler_pb2.ClusterView(workers=self._entries.values())
        outage.show(scheduler_wire.view_entries(view), self._true_s, now_s)
        return outage


def _says_more(now: scheduler_pb2.WorkerEntry, known: scheduler_pb2.WorkerEntry | None) -> bool:
    """Whether an entry tells more than the one that is known."""
    return known is None or known.info.epoch != now.info.epoch or _is_back(now, known)


def _is_back(now: scheduler_pb2.WorkerEntry | None, before: scheduler_pb2.WorkerEntry) -> bool:
    """Whether a worker has registered anew and, if it was ready, said so again."""
    ready = cluster_pb2.PROCESS_STATE_READY
    return now is not None and (now.load.state >= ready or before.load.state != ready)
