"""How a front proxy in virtual time gets its plans: from the scheduler, or from its own planner while that is away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from front_proxy.flow_events import AskPlan, Outcome, Planned, PlanRefused
from front_proxy.outage_planner import SESSION, OutagePlanner
from front_proxy.work import Placement
from runtime.failures import Failure, FailureKind
from scheduler.actions import Placement as CorePlacement
from scheduler.actions import ReplyPlan, ReplyRefusal
from scheduler.config import SchedulerConfig
from scheduler.events import PlanRequested, PlansRunning, RunningPlan
from scheduler.facts import WorkerFacts, WorkerLoad
from simulation.world import UP, Stream

if TYPE_CHECKING:
    from simulation.cluster import SimCluster
    from simulation.fronts import Client, SimFront

PLAN_TIMEOUT_S = 1.0
LOAD_FADE_S = 1.0

WorkerSeen = tuple[WorkerFacts, WorkerLoad]


class _Pending(msgspec.Struct):
    client: Client
    ask: AskPlan


class FrontPlans:
    """The plans of one front proxy and its stream to the scheduler."""

    def __init__(self, front: SimFront, cluster: SimCluster, policy: SchedulerConfig) -> None:
        self.stream: Stream | None = None
        self.session = 0
        self.pending: dict[int, _Pending] = {}
        self.running: dict[int, RunningPlan] = {}
        self._front = front
        self._world = front.world
        self._cluster = cluster
        self._policy = policy
        self._next_plan_id = 1
        self._opened = False
        self._knows_more = False
        self._view: dict[str, WorkerSeen] = {}
        self._view_s = 0.0
        self._outage: OutagePlanner | None = None

    # From the scheduler

    def connected(self, session: int, stream: Stream) -> None:
        """A stream is open: say what runs, and ask again what was not answered."""
        self.session, self.stream, self._opened = session, stream, False
        self._tell_running(self.running.values(), complete=True)
        for plan_id, pending in self.pending.items():
            self._send_question(plan_id, pending)

    def on_lost(self) -> None:
        """The stream broke."""
        if self._answers:
            self._view_s = self._world.now_s
        self.stream, self._opened = None, False
        if not self._front.alive:
            return
        self._world.after(self._world.rng.uniform(0.01, 0.3), self._cluster.scheduler.connect, self._front)
        for plan_id in list(self.pending):
            self._plan_here(plan_id)

    def see(self, workers: Sequence[WorkerSeen], rebuilding: bool) -> None:
        """The scheduler shows the cluster. One that is rebuilding may know less than we do."""
        self._opened = True
        now = {facts.worker_id: (facts, load) for facts, load in workers}
        self._knows_more = rebuilding and not self._view.keys() <= now.keys()
        if not self._knows_more:
            self._view, self._view_s, self._outage = now, self._world.now_s, None
            return
        self._view.update(now)
        if self._outage is not None:
            self._outage.show(workers, self._world.now_s, self._world.now_s)

    def on_reply(self, reply: ReplyPlan | ReplyRefusal) -> None:
        """The answer to a question; nobody may wait for it any more."""
        self._opened = True
        pending = self.pending.pop(reply.plan_id, None)
        if pending is None:
            return
        if isinstance(reply, ReplyRefusal):
            pending.client.feed(PlanRefused(attempt=pending.ask.attempt, failure=reply.failure))
            return
        self.running[reply.plan_id] = RunningPlan(
            plan_id=reply.plan_id,
            request_id=pending.client.asked.request_id,
            prefill=reply.prefill,
            decode=reply.decode,
            decode_blocks=reply.decode_blocks_reserved,
        )
        pending.client.feed(
            Planned(
                attempt=pending.ask.attempt,
                prefill=_placement(reply.prefill),
                decode=_placement(reply.decode),
                decode_blocks_reserved=reply.decode_blocks_reserved,
                reason=reply.reason,
            )
        )

    # From the requests

    def ask(self, client: Client, ask: AskPlan) -> int:
        """Where should it run?"""
        plan_id = self._next_plan_id
        self._next_plan_id += 1
        pending = self.pending[plan_id] = _Pending(client, ask)
        if not self._answers and self._view:
            self._world.after(0.0, self._plan_here, plan_id)
            return plan_id
        self._world.after(PLAN_TIMEOUT_S, self._on_timeout, plan_id)
        self._send_question(plan_id, pending)
        return plan_id

    def end(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        """Free what a plan reserved."""
        self.pending.pop(plan_id, None)
        self.running.pop(plan_id, None)
        if self._outage is not None:
            self._outage.ended(plan_id, output_tokens, self._world.now_s)
        self._send_end(plan_id, outcome, output_tokens)
        if self._world.rng.random() < self._front.faults.repeat:
            self._send_end(plan_id, outcome, output_tokens)

    def suspect(self, worker_id: str, epoch: int) -> None:
        """A worker could not be used."""
        if self._outage is not None:
            self._outage.suspect(worker_id, epoch, "lost", self._world.now_s)
        if self.stream is not None:
            self.stream.send(UP, self._cluster.scheduler.on_suspect, worker_id, epoch)

    # Without the scheduler

    @property
    def _answers(self) -> bool:
        return self._opened and not self._knows_more

    def _plan_here(self, plan_id: int) -> None:
        pending = self.pending.get(plan_id)
        if pending is None or not self._view or not self._front.alive:
            return
        now_s = self._world.now_s
        if self._outage is None:
            self._outage = OutagePlanner(
                self._policy,
                running=self.running.values(),
                load_fade_s=LOAD_FADE_S,
                rng=self._world.rng,
                now_s=now_s,
            )
            self._outage.show(list(self._view.values()), self._view_s, now_s)
        reply = self._outage.plan(self._question(SESSION, plan_id, pending), now_s)
        self._outage.check()
        self._world.tell(self._front.name, f"plans {pending.client.asked.request_id} itself")
        self.on_reply_here(reply)

    def on_reply_here(self, reply: ReplyPlan | ReplyRefusal) -> None:
        """As ``on_reply``, and the scheduler hears of the plan when it is there."""
        opened = self._opened
        self.on_reply(reply)
        self._opened = opened
        plan = self.running.get(reply.plan_id)
        if plan is not None:
            self._tell_running([plan], complete=False)

    def _on_timeout(self, plan_id: int) -> None:
        if plan_id not in self.pending or not self._front.alive:
            return
        self._send_end(plan_id, "failed", 0)
        if self._view:
            self._plan_here(plan_id)
            return
        failure = Failure(kind=FailureKind.UNAVAILABLE, message="no answer")
        self.on_reply(ReplyRefusal(session=self.session, plan_id=plan_id, failure=failure, cause="no_worker"))

    def _question(self, session: int, plan_id: int, pending: _Pending) -> PlanRequested:
        asked, ask = pending.client.asked, pending.ask
        return PlanRequested(
            session=session,
            plan_id=plan_id,
            request_id=asked.request_id,
            prompt_tokens=asked.prompt_tokens + ask.shown_tokens,
            output_tokens_max=asked.output_tokens_max - ask.shown_tokens,
            excluded_worker_ids=frozenset(ask.excluded_worker_ids),
            pinned_decode_worker_id=ask.pinned_decode_worker,
            prefill_only=ask.prefill_only,
        )

    def _send_question(self, plan_id: int, pending: _Pending) -> None:
        if self.stream is not None:
            question = self._question(self.session, plan_id, pending)
            self.stream.send(UP, self._cluster.scheduler.on_plan, self._front, question)

    def _send_end(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        if self.stream is not None:
            self.stream.send(UP, self._cluster.scheduler.on_ended, self.session, plan_id, outcome, output_tokens)

    def _tell_running(self, plans: Iterable[RunningPlan], *, complete: bool) -> None:
        if self.stream is not None:
            told = PlansRunning(
                session=self.session, plans=tuple(plans), asked=frozenset(self.pending), complete=complete
            )
            self.stream.send(UP, self._cluster.scheduler.on_running, told)


def _placement(placed: CorePlacement | None) -> Placement | None:
    if placed is None:
        return None
    return Placement(worker_id=placed.worker_id, address=placed.address, epoch=placed.epoch)
