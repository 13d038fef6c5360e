"""Admission of requests: each is placed at once, waits in the queue, or is refused. Chooses no worker itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from runtime.roles import WorkerRole
from runtime.timing.retry_after import RETRY_AFTER_MIN_S
from scheduler.api.actions import Action, ReplyPlan, ReplyWaiting
from scheduler.api.events import PlanRequested
from scheduler.cluster.state import ClusterState
from scheduler.config import SchedulerParameters
from scheduler.queueing.refusals import NONE_CAME, PASSING, Refusals
from scheduler.queueing.reservations import Reservations
from scheduler.queueing.wait_queue import EXCLUDED_MAX_S, Waiting, WaitQueue, charge_of, class_of
from scheduler.routing.placement import Cause, NotPlaced, Placed, Planner
from scheduler.routing.prefixes import Prefixes

_SHORT_OF: dict[Cause, WorkerRole] = {
    "no_headroom": "decode",
    "decode_slots": "decode",
    "prefill_slots": "prefill",
    "prefill_backlog": "prefill",
}
TTFT_LEFT_MIN_S = 1e-6
"""What is left of a TTFT that is missed already. 0 would mean that none is asked for."""


class AdmissionController:
    """Decides with the queue, the planner and the reservations what happens to each request."""

    def __init__(
        self,
        config: SchedulerParameters,
        planner: Planner,
        prefixes: Prefixes,
        cluster: ClusterState,
        reservations: Reservations,
        queue: WaitQueue,
        refusals: Refusals,
    ) -> None:
        self._config = config
        self._planner = planner
        self._prefixes = prefixes
        self._cluster = cluster
        self._reservations = reservations
        self._queue = queue
        self._refusals = refusals
        self.short_of: WorkerRole | None = None
        """The role whose workers have no room for the first request that waits, as far as that is the cause."""

    @property
    def itl_refused(self) -> int:
        """How many were refused because no decode worker would have kept the time between tokens."""
        return self._refusals.itl

    def ask(self, event: PlanRequested, now_s: float, *, recovering: bool) -> Sequence[Action]:
        """Place a request, let it wait, or refuse it."""
        key = (event.session, event.plan_id)
        if event.plan_id in self._reservations.fronts[event.session].plans or key in self._queue:
            return (self._refusals.refuse(event, "plan_id_in_use"),)
        placed = self._place(event, now_s)
        if isinstance(placed, NotPlaced) and not self._passes(event, placed, now_s, recovering=recovering):
            return (self._refusals.refuse(event, placed.cause, placed.message, options=placed.options),)
        # A resumed request was placed before, so it goes ahead of new ones. One that no worker can take now is set
        # aside by ``serve``, and the others need not wait for it.
        none_waits = self._queue.head() is None
        first = none_waits or (event.resumed and not self._queue.has_resumed(class_of(event)))
        if isinstance(placed, Placed) and first:
            self._queue.charge(event, self._cost(event))
            return (self._grant(event, placed, now_s, since_s=now_s),)
        # Shortly after a start some workers have not registered yet.
        none_there = isinstance(placed, NotPlaced) and placed.cause == "no_worker"
        missing_wait_s = self._config.missing_workers_wait_max_s if recovering or none_there else 0.0
        wake_wait_s = self._config.scaling.wake_timeout_s if self._wakes() else 0.0
        waiting, rejected = self._queue.offer(
            event, self._cost(event), now_s, missing_wait_s=missing_wait_s, wake_wait_s=wake_wait_s
        )
        if waiting is None and none_waits and isinstance(placed, NotPlaced):
            return (self._refusals.refuse(event, placed.cause, placed.message),)
        actions: list[Action] = [self._refusals.refuse(each.event, each.cause) for each in rejected]
        actions.extend(self.serve(now_s, recovering=recovering))
        if waiting is not None and key in self._queue:
            actions.append(
                ReplyWaiting(session=event.session, plan_id=event.plan_id, wait_max_s=waiting.until_s - now_s)
            )
        return actions

    def serve(self, now_s: float, *, recovering: bool) -> Sequence[Action]:
        """Place waiting requests in order. Stop at the first without room: it must not be overtaken for ever."""
        self.short_of = None
        if not self._queue:
            return ()
        actions: list[Action] = []
        while (waiting := self._queue.head()) is not None:
            event = _as_of(waiting, now_s)
            placed = self._place(event, now_s)
            if isinstance(placed, Placed):
                self._queue.take(waiting, now_s)
                actions.append(self._grant(event, placed, now_s, since_s=waiting.since_s))
            elif event.resumed and placed.cause == "no_worker":
                self._queue.set_aside(waiting, now_s)
            elif self._passes(event, placed, now_s, recovering=recovering):
                self.short_of = _SHORT_OF.get(placed.cause)
                if placed.cause == "no_worker":
                    self._queue.no_worker(now_s)
                break
            else:
                self._queue.remove((event.session, event.plan_id), now_s)
                waited_s = now_s - waiting.since_s
                refusal = self._refusals.refuse(
                    event, placed.cause, placed.message, options=placed.options, waited_s=waited_s
                )
                actions.append(refusal)
        return actions

    def overdue(self, now_s: float) -> Sequence[Action]:
        """Refuse every request that has waited for as long as it may."""
        overdue = self._queue.overdue(now_s)
        if not overdue:
            return ()
        if not self._wakes():
            message = "" if self._decode_ready() else NONE_CAME
            return [self._refusals.refuse(each.event, each.cause, message, waited_s=each.waited_s) for each in overdue]
        start_s = self._cluster.start_s or self._config.scaling.wake_timeout_s
        return [
            self._refusals.refuse(
                each.event,
                "no_worker",
                f"Workers are started, which takes about {start_s:.0f} s; the request has waited as long as it may.",
                waited_s=each.waited_s,
                retry_after_s=max(RETRY_AFTER_MIN_S, start_s - each.waited_s),
            )
            for each in overdue
        ]

    def _wakes(self) -> bool:
        """Whether requests wait for workers that are started because of them, also those that need no decode worker."""
        return self._config.scaling.wakes and not self._decode_ready()

    def _decode_ready(self) -> bool:
        return any(worker.ready for worker in self._cluster.pool_for_requests().with_role("decode"))

    def _place(self, event: PlanRequested, now_s: float) -> Placed | NotPlaced:
        if not self._reservations.has_room():
            limit = self._config.plans_in_flight_max
            message = f"{limit} requests are in flight, the configured most."
            return NotPlaced(cause="plans_in_flight", message=message)
        return self._planner.place(event, self._cluster.pool_for_requests(), now_s)

    def _passes(self, event: PlanRequested, verdict: NotPlaced, now_s: float, *, recovering: bool) -> bool:
        """Whether waiting makes sense.

        A worker that is silent, that has just left, or that is missing after a start may be about to come.
        """
        if verdict.cause == "no_worker":
            just_left = now_s < self._cluster.decode_left_s + self._config.silence_timeout_s
            decodes = self._cluster.pool_for_requests().with_role("decode")
            if self._config.scaling.wakes or event.resumed or recovering or just_left:
                return True
            return any(worker.silent for worker in decodes)
        return verdict.cause in PASSING

    def _grant(self, event: PlanRequested, chosen: Placed, now_s: float, *, since_s: float) -> ReplyPlan:
        charge = charge_of(event, self._output_expected(event))
        for worker in (chosen.prefill, chosen.decode):
            if worker is not None:
                self._prefixes.sent(worker, event.block_keys, now_s)
        return self._reservations.grant(event, chosen, charge, now_s, since_s=since_s)

    def _cost(self, event: PlanRequested) -> int:
        """What a request takes of the cluster, in tokens."""
        return event.prompt_tokens + self._output_expected(event)

    def _output_expected(self, event: PlanRequested) -> int:
        """In tokens. When the request ends, its tenant's charge is corrected to the real output."""
        return min(event.output_tokens_max, self._config.output_reserve_tokens)


def _as_of(waiting: Waiting, now_s: float) -> PlanRequested:
    """The request as it is asked now.

    After EXCLUDED_MAX_S the workers that failed it may be chosen again, and of the TTFT asked for less is left.
    """
    event = waiting.event
    if event.excluded_worker_ids and waiting.since_s + EXCLUDED_MAX_S <= now_s:
        event = msgspec.structs.replace(event, excluded_worker_ids=frozenset())
    if event.ttft_slo_s:
        left_s = max(TTFT_LEFT_MIN_S, waiting.since_s + event.ttft_slo_s - now_s)
        event = msgspec.structs.replace(event, ttft_slo_s=left_s)
    return event
