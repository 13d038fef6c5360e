"""Plans without a scheduler, from the last view of the cluster and by the scheduler's own core. Pure.

It always knows the plans that run. During an outage it also has a SchedulerCore of its own. The load that the view
shows counts less with time and nothing after ``load_fade_s``. What this front proxy placed is reserved until it ends.
It does not see the plans of other front proxies, so the workers' own admission has the last word. A request is placed
or refused: nothing is queued here. ``plan_client`` decides when to plan here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from front_proxy.planning.cluster_view import ClusterView, WorkerEntry
from front_proxy.request.events import Outcome
from scheduler.api.actions import ReplyPlan, ReplyRefusal
from scheduler.api.chance import Random
from scheduler.api.events import (
    FrontJoined,
    PlanRequested,
    PlansRunning,
    RequestEnded,
    RunningPlan,
    Tick,
    WorkerJoined,
    WorkerLoadReported,
    WorkerSuspected,
)
from scheduler.api.worker_info import WorkerLoad
from scheduler.config import ScalingConfig, SchedulerConfig, SchedulerParameters
from scheduler.core import SchedulerCore

SESSION = 1
FADE_INTERVAL_S = 0.25
"""Loads are not faded more often than this."""
# A faded load is near 0 and must not be taken for an idle worker, so the detection of leaks is off.
_NEVER_LEAKED_S = float("inf")


class FallbackPlanner:
    """Time is an argument and never goes back."""

    def __init__(
        self, policy: SchedulerConfig, view: ClusterView, *, view_max_age_s: float, load_fade_s: float, rng: Random
    ) -> None:
        """``policy``: the scheduler's settings. ``view_max_age_s`` 0: nothing is planned here."""
        self.running: dict[int, RunningPlan] = {}
        """Every plan in flight, whether made here or by a scheduler."""
        self._policy = msgspec.structs.replace(
            SchedulerParameters.of(policy),
            waiting_max=0,
            leak_after_s=_NEVER_LEAKED_S,
            # It changes no roles.
            scaling=ScalingConfig(),
        )
        self._view = view
        self._view_max_age_s = view_max_age_s
        self._load_fade_s = load_fade_s
        self._rng = rng
        self._true_s = float("-inf")
        # Of the present outage.
        self._core: SchedulerCore | None = None
        self._loads: dict[str, tuple[WorkerLoad, float]] = {}
        self._sessions = SESSION
        self._faded_s = 0.0
        self._plans_made = 0

    @property
    def active(self) -> bool:
        """Whether requests are planned here."""
        return self._core is not None

    def view_age_s(self, now_s: float) -> float:
        """Time since the last view was true."""
        return now_s - self._true_s

    def possible(self, now_s: float) -> bool:
        """Whether the last view is good enough to plan from."""
        return 0.0 < self._view_max_age_s >= self.view_age_s(now_s) and self._view.snapshot.usable

    def still_true(self, now_s: float) -> None:
        """The scheduler was there until now, so the last view was true until now."""
        self._true_s = now_s

    def view_changed(self, told: Sequence[WorkerEntry], now_s: float) -> None:
        """A new view came. If its scheduler knows every worker that is known here, the view is true now.

        Otherwise, in an outage, the view's entries (``told``) are merged into what the fallback core knows of workers.
        """
        if not self._view.knows_more:
            self.still_true(now_s)
        elif self._core is not None:
            self._show(self._core, told, now_s, now_s)

    def begin(self, now_s: float) -> None:
        """An outage begins."""
        assert self._core is None
        core = self._core = SchedulerCore(self._policy, self._rng)
        self._loads, self._sessions, self._plans_made = {}, SESSION, 0
        core.handle(FrontJoined(session=SESSION, front_proxy_id="this"), now_s)
        core.handle(PlansRunning(session=SESSION, plans=tuple(self.running.values())), now_s)
        self._show(core, self._view.snapshot.workers, self._true_s, now_s)

    def resume(self) -> int:
        """The scheduler plans again; how many plans were made without it."""
        assert self._core is not None
        self._core = None
        return self._plans_made

    def plan(self, question: PlanRequested, now_s: float) -> RunningPlan | ReplyRefusal:
        """Place a request in the outage that began, or refuse it."""
        assert self._core is not None
        if now_s >= self._faded_s + FADE_INTERVAL_S:
            self._fade(self._core, now_s)
        # Resumed requests wait only in the scheduler's queue, so here they are asked as new ones.
        event = msgspec.structs.replace(question, session=SESSION, resumed=False)
        (reply,) = self._core.handle(event, now_s)
        if isinstance(reply, ReplyRefusal):
            return reply
        assert isinstance(reply, ReplyPlan), reply
        self._plans_made += 1
        plan = self.running[question.plan_id] = RunningPlan(
            plan_id=question.plan_id,
            request_id=question.request_id,
            prefill=reply.prefill,
            decode=reply.decode,
            decode_blocks=reply.decode_blocks_reserved,
        )
        return plan

    def granted(self, plan: RunningPlan, now_s: float) -> None:
        """A scheduler placed a request: reserve what it takes."""
        self.running[plan.plan_id] = plan
        if self._core is not None:
            self._core.handle(PlansRunning(session=SESSION, plans=(plan,)), now_s)

    def ended(self, plan_id: int, outcome: Outcome, output_tokens: int, now_s: float) -> None:
        """A plan is over. Idempotent."""
        self.running.pop(plan_id, None)
        if self._core is not None:
            ended = RequestEnded(session=SESSION, plan_id=plan_id, outcome=outcome, output_tokens=output_tokens)
            self._core.handle(ended, now_s)

    def suspect(self, worker_id: str, epoch: int, reason: str, now_s: float) -> None:
        """A worker could not be used."""
        if self._core is not None:
            self._core.handle(WorkerSuspected(worker_id=worker_id, epoch=epoch, reason=reason), now_s)

    def check(self) -> None:
        """Assert every invariant. Slow: for tests."""
        for plan_id, plan in self.running.items():
            assert plan.plan_id == plan_id, (plan_id, plan)
        if self._core is not None:
            self._core.check()
            assert not any(self._core.waiting().values()), "a request is queued here"
            assert self._core.fronts[SESSION].plans.keys() == self.running.keys(), "reservations are not what runs"

    def _show(self, core: SchedulerCore, entries: Sequence[WorkerEntry], seen_s: float, now_s: float) -> None:
        """Take over a view that was true at ``seen_s``. Workers that are not in it stay as they are."""
        for entry in entries:
            known = core.cluster.get(entry.info.worker_id)
            told = (entry.info.epoch, entry.info.registration)
            held = (known.info.epoch, known.info.registration) if known is not None else (0, 0)
            if held > told:
                # An older view, of an engine that is no more, or before a change of role.
                continue
            if held != told:
                self._sessions += 1
                core.handle(WorkerJoined(session=self._sessions, info=entry.info), now_s)
            self._loads[entry.info.worker_id] = (entry.load_to_plan_by, seen_s)
        self._fade(core, now_s)

    def _fade(self, core: SchedulerCore, now_s: float) -> None:
        """Time passed: loads count less, and ejections end."""
        self._faded_s = now_s
        for worker_id, (load, seen_s) in self._loads.items():
            worker = core.cluster.get(worker_id)
            if worker is None:
                continue
            share = max(0.0, 1.0 - (now_s - seen_s) / self._load_fade_s)
            report = WorkerLoadReported(session=worker.session, worker_id=worker_id, load=_faded(load, share))
            core.handle(report, now_s)
        # Behind the reports: they are also what keeps a worker from falling silent.
        core.handle(Tick(), now_s)


def _faded(load: WorkerLoad, share: float) -> WorkerLoad:
    return msgspec.structs.replace(
        load,
        requests_running=int(load.requests_running * share),
        requests_waiting=int(load.requests_waiting * share),
        kv_blocks_used=int(load.kv_blocks_used * share),
        prefill_tokens_queued=int(load.prefill_tokens_queued * share),
        ranks=tuple([_faded(rank, share) for rank in load.ranks]),
    )
