"""Tracks the plans in flight and what they reserve on present workers. Places and refuses nothing.

A worker's reserved blocks are the sum over the plans that name it; no reservation outlives its worker or its front
proxy. ``check`` asserts it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from scheduler.api.actions import Placement, ReplyPlan, ReportDropped
from scheduler.api.events import PlanRequested, RunningPlan
from scheduler.api.explanation import PlanExplained
from scheduler.cluster.outlier_detector import Standing
from scheduler.cluster.prompt_queue import PlanKey
from scheduler.cluster.state import ClusterState
from scheduler.cluster.worker import Worker
from scheduler.queueing.wait_queue import Charge
from scheduler.routing.placement import Placed, Reason


class GrantedPlan(msgspec.Struct, frozen=True, gc=False):
    """A plan that has not ended. It names incarnations of workers.

    A worker that only lost its stream may return with its KV. A restarted one is another incarnation and has lost it.
    """

    request_id: str
    prefill: Placement | None
    decode: Placement | None
    decode_blocks: int
    since_s: float
    # None: another scheduler, or the front proxy itself, made it.
    charge: Charge | None = None


class FrontProxySession(msgspec.Struct):
    """One front proxy's stream and its plans in flight, by plan id."""

    front_proxy_id: str
    incarnation: int
    plans: dict[int, GrantedPlan] = {}


class Reservations:
    """The plans of every front proxy. Keeps the workers' reservations equal to them."""

    def __init__(self, cluster: ClusterState, plans_in_flight_max: int) -> None:
        self.fronts: dict[int, FrontProxySession] = {}
        self.plans_in_flight = 0
        # Plans since the start, and the seconds that their prompts were predicted to take.
        self.granted = 0
        self.prompts_s = 0.0
        self._cluster = cluster
        self._plans_in_flight_max = plans_in_flight_max

    def has_room(self) -> bool:
        """Whether one more plan may be granted."""
        return self.plans_in_flight < self._plans_in_flight_max

    def join(self, session: int, front_proxy_id: str, incarnation: int) -> None:
        """A front proxy opened a stream."""
        assert session not in self.fronts, session
        self.fronts[session] = FrontProxySession(front_proxy_id, incarnation)

    def leave(self, session: int, now_s: float) -> None:
        """Its stream ended, and its plans with it."""
        self.end_all(session, now_s)
        del self.fronts[session]

    def end_all(self, session: int, now_s: float) -> None:
        """Free what a stream's plans reserve."""
        for plan_id in list(self.fronts[session].plans):
            self.end((session, plan_id), now_s)

    def streams_of_same(self, session: int) -> Sequence[int]:
        """The sessions of the same process's other streams that are open here."""
        own = self.fronts[session]
        name = (own.front_proxy_id, own.incarnation)
        return [
            other
            for other, front in self.fronts.items()
            if other != session and (front.front_proxy_id, front.incarnation) == name
        ]

    def grant(self, event: PlanRequested, placed: Placed, charge: Charge, now_s: float, *, since_s: float) -> ReplyPlan:
        """Reserve what was placed, and return the plan. It waited since ``since_s``."""
        key = (event.session, event.plan_id)
        assert event.plan_id not in self.fronts[event.session].plans, key
        prefill, decode = placed.prefill, placed.decode
        computing = prefill or decode
        assert computing is not None
        if decode is not None:
            decode.reserve(key, placed.decode_blocks, itl_slo_s=event.itl_slo_s)
        # A pinned sibling finds its prompt's KV in place and computes next to nothing.
        if placed.reason is not Reason.PINNED:
            computing.assign_prompt(key, event.prompt_tokens, placed.compute_s, now_s)
            # Of a worker with several ranks, each computes at its own pace.
            self.prompts_s += placed.compute_s / computing.info.rank_count
            if decode is computing:
                decode.prompt_share.add(placed.compute_s, placed.window_s, now_s)
        for worker in (prefill, decode):
            if worker is not None and worker.health.standing is Standing.PROBATION:
                worker.health.planned(key)
                worker.member.judge()
        at_prefill = prefill.placement if prefill is not None else None
        at_decode = decode.placement if decode is not None else None
        self.fronts[event.session].plans[event.plan_id] = GrantedPlan(
            event.request_id, at_prefill, at_decode, placed.decode_blocks, now_s, charge
        )
        self.plans_in_flight += 1
        self.granted += 1
        return ReplyPlan(
            session=event.session,
            plan_id=event.plan_id,
            prefill=at_prefill,
            decode=at_decode,
            decode_blocks_reserved=placed.decode_blocks,
            reason=placed.reason.value,
            waited_s=now_s - since_s,
            hold=event.hold,
            explained=PlanExplained(
                request_id=event.request_id,
                prompt_tokens=event.prompt_tokens,
                chosen=placed.chosen,
                options=placed.options,
                ttft_slo_s=event.ttft_slo_s,
                itl_slo_s=event.itl_slo_s,
            ),
        )

    def end(self, key: PlanKey, now_s: float, *, finished: bool = False) -> Charge | None:
        """Free a plan's reservation, if the plan exists. Returns the charge for its expected output."""
        front = self.fronts.get(key[0])
        plan = front.plans.pop(key[1], None) if front is not None else None
        if plan is None:
            return None
        self.plans_in_flight -= 1
        for placed in (plan.prefill, plan.decode):
            worker = self._member_of(placed)
            if worker is not None:
                worker.forget(key, now_s)
                if finished:
                    worker.health.succeeded(key, now_s)
                worker.health.ended(key)
                worker.member.judge()
        return plan.charge

    def returned(self, worker: Worker) -> None:
        """A worker joined. Plans that name this incarnation go on: only its stream was lost."""
        for session, front in self.fronts.items():
            for plan_id, plan in front.plans.items():
                rank = self._member_of(plan.decode)
                if rank is not None and rank.member is worker:
                    rank.adopt((session, plan_id), plan.decode_blocks)

    def take_over(self, session: int, plans: Iterable[RunningPlan], now_s: float) -> None:
        """Count plans that another scheduler or a front proxy made, unless known. Their workers may register later."""
        front = self.fronts[session]
        for plan in plans:
            if plan.plan_id in front.plans or not self.has_room():
                continue
            front.plans[plan.plan_id] = GrantedPlan(
                plan.request_id, plan.prefill, plan.decode, plan.decode_blocks, now_s
            )
            self.plans_in_flight += 1
            worker = self._member_of(plan.decode)
            if worker is not None:
                worker.adopt((session, plan.plan_id), plan.decode_blocks)

    def drop_unnamed(self, session: int, named: Collection[int], now_s: float) -> Sequence[ReportDropped]:
        """End the plans of a front proxy that it does not name any more."""
        unnamed = [plan_id for plan_id in self.fronts[session].plans if plan_id not in named]
        return [self._drop((session, plan_id), "not_running", now_s) for plan_id in unnamed]

    def drop_idle(self, idle: Collection[Placement], after_s: float, now_s: float) -> Sequence[ReportDropped]:
        """End the plans that are ``after_s`` old and whose workers are all ``idle``."""
        unneeded = [
            (session, plan_id)
            for session, front in self.fronts.items()
            for plan_id, plan in front.plans.items()
            if plan.since_s + after_s <= now_s
            and all(placed in idle for placed in (plan.prefill, plan.decode) if placed is not None)
        ]
        return [self._drop(key, "workers_idle", now_s) for key in unneeded]

    def request_ids(self) -> set[str]:
        """The requests that run."""
        return {plan.request_id for front in self.fronts.values() for plan in front.plans.values()}

    def check(self) -> None:
        """Assert that plans and reservations are the same. Slow."""
        assert self.plans_in_flight == sum(len(front.plans) for front in self.fronts.values())
        for rank in [rank for worker in self._cluster.workers.values() for rank in worker.ranks]:
            for key in rank.reserved:
                plan = self._plan(key)
                assert plan is not None and plan.decode == rank.placement, (rank.target, key)
            for key in rank.prompts:
                plan = self._plan(key)
                assert plan is not None and rank.placement == (plan.prefill or plan.decode), (rank.target, key)
        for session, front in self.fronts.items():
            for plan_id, plan in front.plans.items():
                decode = self._member_of(plan.decode)
                assert decode is None or (session, plan_id) in decode.reserved, (session, plan_id)

    def _drop(self, key: PlanKey, reason: str, now_s: float) -> ReportDropped:
        request_id = self.fronts[key[0]].plans[key[1]].request_id
        self.end(key, now_s)
        return ReportDropped(request_id=request_id, reason=reason)

    def _plan(self, key: PlanKey) -> GrantedPlan | None:
        front = self.fronts.get(key[0])
        return front.plans.get(key[1]) if front is not None else None

    def _member_of(self, placed: Placement | None) -> Worker | None:
        """The worker of a plan, or its rank, if that incarnation is a member now."""
        worker = self._cluster.get(placed.worker_id) if placed is not None else None
        if worker is not None:
            for rank in worker.ranks:
                if rank.placement == placed:
                    return rank
        return None
