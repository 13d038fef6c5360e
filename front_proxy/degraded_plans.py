"""What a front proxy needs to plan without the scheduler: the last view, what runs, and the planner of an outage. Pure.

Says whether and how; when is ``plan_desk``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence

from front_proxy.cluster_view import ClusterView, WorkerEntry
from front_proxy.desk_events import PlanQuestion, requested
from front_proxy.outage_planner import SESSION, OutagePlanner
from runtime.failures import Failure
from scheduler.actions import ReplyPlan
from scheduler.config import SchedulerConfig
from scheduler.events import RunningPlan
from scheduler.profile import Random


class DegradedPlans:
    """Time is an argument and never goes back."""

    def __init__(
        self, policy: SchedulerConfig, view: ClusterView, *, view_max_age_s: float, load_fade_s: float, rng: Random
    ) -> None:
        self.running: dict[int, RunningPlan] = {}
        """Every plan in flight, whoever made it."""
        self._policy = policy
        self._view = view
        self._view_max_age_s = view_max_age_s
        self._load_fade_s = load_fade_s
        self._rng = rng
        self._true_s = float("-inf")
        self._outage: OutagePlanner | None = None

    @property
    def active(self) -> bool:
        """Whether requests are planned here."""
        return self._outage is not None

    def shown(self, told: Sequence[WorkerEntry], now_s: float) -> None:
        """The view has these entries from a scheduler that knows everybody, or from one that comes back to itself."""
        if not self._view.knows_more:
            self.still_true(now_s)
        elif self._outage is not None:
            self._show(self._outage, told, now_s, now_s)

    def still_true(self, now_s: float) -> None:
        """The scheduler was there until now, so the last view was true until now."""
        self._true_s = now_s

    def view_age_s(self, now_s: float) -> float:
        """Time since the last view was true."""
        return now_s - self._true_s

    def possible(self, now_s: float) -> bool:
        """Whether the last view is good enough to plan from."""
        return self.view_age_s(now_s) <= self._view_max_age_s and self._view.snapshot.usable

    def begin(self, now_s: float) -> None:
        """An outage begins."""
        assert self._outage is None
        self._outage = OutagePlanner(
            self._policy,
            running=self.running.values(),
            load_fade_s=self._load_fade_s,
            rng=self._rng,
            now_s=now_s,
        )
        self._show(self._outage, self._view.snapshot.workers, self._true_s, now_s)

    def plan(self, plan_id: int, question: PlanQuestion, now_s: float) -> RunningPlan | Failure:
        """Place a request in the outage that began."""
        assert self._outage is not None
        reply = self._outage.plan(requested(SESSION, plan_id, question), now_s)
        if not isinstance(reply, ReplyPlan):
            return reply.failure
        plan = self.running[plan_id] = RunningPlan(
            plan_id=plan_id,
            request_id=question.request_id,
            prefill=reply.prefill,
            decode=reply.decode,
            decode_blocks=reply.decode_blocks_reserved,
        )
        return plan

    def granted(self, plan: RunningPlan, now_s: float) -> None:
        """The scheduler placed a request."""
        self.running[plan.plan_id] = plan
        if self._outage is not None:
            self._outage.take_over((plan,), now_s)

    def ended(self, plan_id: int, output_tokens: int, now_s: float) -> None:
        """A plan is over. Idempotent."""
        self.running.pop(plan_id, None)
        if self._outage is not None:
            self._outage.ended(plan_id, output_tokens, now_s)

    def suspect(self, worker_id: str, epoch: int, reason: str, now_s: float, request_id: str = "") -> None:
        """A worker could not be used."""
        if self._outage is not None:
            self._outage.suspect(worker_id, epoch, reason, now_s, request_id)

    def resume(self) -> int:
        """The scheduler plans again; how many plans were made without it."""
        assert self._outage is not None
        made, self._outage = self._outage.plans_made, None
        return made

    def check(self) -> None:
        """Assert every invariant of the books. Slow: for tests."""
        for plan_id, plan in self.running.items():
            assert plan.plan_id == plan_id, (plan_id, plan)
        if self._outage is not None:
            self._outage.check()
            assert self._outage.plan_ids <= self.running.keys(), "the outage's books keep what does not run"

    def _show(self, outage: OutagePlanner, entries: Sequence[WorkerEntry], seen_s: float, now_s: float) -> None:
        outage.show([(entry.facts, entry.load_to_plan_by) for entry in entries], seen_s, now_s)
