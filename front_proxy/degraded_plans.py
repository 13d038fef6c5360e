"""What a front proxy needs to plan without the scheduler: the last view, what runs, and the planner of an outage. Pure.

Says whether and how; when is ``plan_desk``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from front_proxy.cluster_view import ClusterView, WorkerEntry
from front_proxy.desk_events import PlanQuestion, requested
from front_proxy.flow_events import Outcome
from front_proxy.outage_planner import SESSION, OutagePlanner, PlannerReply
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

    @property
    def waiting(self) -> AbstractSet[int]:
        """Who waits here for a place, by plan id."""
        return self._outage.waiting if self._outage is not None else frozenset()

    def shown(self, told: Sequence[WorkerEntry], now_s: float) -> Sequence[PlannerReply]:
        """The view has these entries from a scheduler that knows everybody, or from one that comes back to itself."""
        if not self._view.knows_more:
            self.still_true(now_s)
        elif self._outage is not None:
            return self._show(self._outage, told, now_s, now_s)
        return ()

    def still_true(self, now_s: float) -> None:
        """The scheduler was there until now, so the last view was true until now."""
        self._true_s = now_s

    def view_age_s(self, now_s: float) -> float:
        """Time since the last view was true."""
        return now_s - self._true_s

    def possible(self, now_s: float) -> bool:
        """Whether the last view is good enough to plan from; none is where 0 is the oldest that may be."""
        return 0.0 < self._view_max_age_s >= self.view_age_s(now_s) and self._view.snapshot.usable

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

    def plan(self, plan_id: int, question: PlanQuestion, now_s: float) -> Sequence[PlannerReply]:
        """Place a request in the outage that began, or let it wait. Others may get their answers by that."""
        assert self._outage is not None
        return self._outage.plan(requested(SESSION, plan_id, question), now_s)

    def look(self, now_s: float) -> Sequence[PlannerReply]:
        """Time passed: somebody may have got his place, or waited for as long as he may."""
        return self._outage.look(now_s) if self._outage is not None else ()

    def let_go(self, now_s: float) -> Sequence[int]:
        """Nobody waits here any more; who did, in their order."""
        return self._outage.let_go(self.running.values(), now_s) if self.waiting and self._outage is not None else ()

    def made(self, reply: ReplyPlan, request_id: str) -> RunningPlan:
        """A request got a place here."""
        plan = self.running[reply.plan_id] = RunningPlan(
            plan_id=reply.plan_id,
            request_id=request_id,
            prefill=reply.prefill,
            decode=reply.decode,
            decode_blocks=reply.decode_blocks_reserved,
        )
        return plan

    def granted(self, plan: RunningPlan, now_s: float) -> Sequence[PlannerReply]:
        """The scheduler placed a request."""
        self.running[plan.plan_id] = plan
        return self._outage.take_over((plan,), now_s) if self._outage is not None else ()

    def ended(self, plan_id: int, outcome: Outcome, output_tokens: int, now_s: float) -> Sequence[PlannerReply]:
        """A plan is over, or one who waits for it left. Idempotent."""
        self.running.pop(plan_id, None)
        return self._outage.ended(plan_id, outcome, output_tokens, now_s) if self._outage is not None else ()

    def suspect(self, worker_id: str, epoch: int, reason: str, now_s: float, request_id: str = "") -> None:
        """A worker could not be used."""
        if self._outage is not None:
            self._outage.suspect(worker_id, epoch, reason, now_s, request_id)

    def resume(self) -> int:
        """The scheduler plans again, and nobody waits here; how many plans were made without it."""
        assert self._outage is not None and not self._outage.waiting
        made, self._outage = self._outage.plans_made, None
        return made

    def check(self) -> None:
        """Assert every invariant of the books. Slow: for tests."""
        for plan_id, plan in self.running.items():
            assert plan.plan_id == plan_id, (plan_id, plan)
        if self._outage is not None:
            self._outage.check()
            assert self._outage.plan_ids == self.running.keys(), "the outage's books are not what runs"

    def _show(
        self, outage: OutagePlanner, entries: Sequence[WorkerEntry], seen_s: float, now_s: float
    ) -> Sequence[PlannerReply]:
        return outage.show([(entry.facts, entry.load_to_plan_by) for entry in entries], seen_s, now_s)
