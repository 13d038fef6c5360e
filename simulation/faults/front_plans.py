"""How a front proxy in virtual time gets its plans: production's PlanClient, over streams that a simulation can break.

Decides nothing. It looks over the plan client's shoulder: a plan from a view that is too old is a violation, and so
is one for a request that was told to wait for its turn and has not waited so long.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, assert_never

import msgspec

from front_proxy.planning.cluster_view import ClusterView
from front_proxy.planning.events import (
    AnswerPlan,
    AnswerRefusal,
    Dial,
    Leave,
    MessageReceived,
    OutageBegan,
    OutageOver,
    PlanClientAction,
    PlanClientEvent,
    PlanEnded,
    PlanNeeded,
    SchedulerLost,
    SendEnd,
    SendQuestion,
    SendRunning,
    SendSuspect,
    StreamDialled,
    StreamLost,
    Suspected,
    TimerFired,
    ViewChanged,
    ViewShown,
)
from front_proxy.planning.plan_client import NEVER_S, PlanClient
from front_proxy.request.events import AskPlan, Outcome, Planned, PlanRefused
from scheduler.api.actions import ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested, PlansRunning
from scheduler.config import SchedulerConfig
from simulation.kernel.network import DOWN, UP, Stream
from simulation.kernel.world import Violation

if TYPE_CHECKING:
    from simulation.faults.cluster import SimCluster
    from simulation.faults.fronts import Client, SimFront
    from simulation.faults.schedulers import SimScheduler

# Long ones hide nothing that was not told at once; an old view is as good as none.
PLANS_TOLD_INTERVALS_S = (0.5, 60.0)
VIEW_MAX_AGES_S = (0.1, 60.0, 60.0)


class FrontPlans:
    """The plans of one front proxy and its stream to the scheduler. ``addresses`` as production's configuration."""

    def __init__(
        self,
        front: SimFront,
        cluster: SimCluster,
        policy: SchedulerConfig,
        *,
        addresses: str = "scheduler",
        plan_client: type[PlanClient] = PlanClient,
    ) -> None:
        self.stream: Stream | None = None
        self.session = 0
        self.connected_s = NEVER_S
        """Since when the plan client has an open stream to a scheduler that is not silent."""
        self.answered_s: dict[int, float] = {}
        """When each plan that runs was given to its request."""
        self._front = front
        self._world = world = front.world
        self._cluster = cluster
        # One failure at a time may not be noticed, the scheduler's included.
        config = msgspec.structs.replace(front.settings.front, scheduler_address=addresses)
        limits = front.settings.front_limits
        if not front.settings.front_fixed:
            view_max_age_s = VIEW_MAX_AGES_S[-1] if front.faults.single else world.rng.choice(VIEW_MAX_AGES_S)
            told_interval_s = world.rng.choice(PLANS_TOLD_INTERVALS_S)
            limits = msgspec.structs.replace(limits, plans_told_interval_s=told_interval_s)
            config = msgspec.structs.replace(config, degraded_view_max_age_s=view_max_age_s)
        self._view_max_age_s = config.degraded_view_max_age_s
        self._patience_s = min(limits.plan_patience_s, config.plan_timeout_s)
        self.view = ClusterView()
        self.plan_client = plan_client(
            config,
            limits,
            view=self.view,
            policy=policy,
            rng=world.rng,
        )
        self.scheduler: SimScheduler | None = None
        """At the other end of the stream."""
        self._clients: dict[int, tuple[Client, AskPlan]] = {}
        self._next_plan_id = 1
        self._actions: collections.deque[PlanClientAction] = collections.deque()
        self._busy = False
        self._alarm_s = NEVER_S
        self._dials = 0
        # Until when the last view was true at most, as seen from outside, and who has to wait until when.
        self._true_s = 0.0
        self._waits_until_s: dict[int, float] = {}
        # When the scheduler should have answered each question that it was asked on this stream.
        self._answers_by_s: dict[int, float] = {}

    # The stream

    def dial(self, address: str) -> None:
        """Begin a stream; ``connected`` follows, or ``on_lost``."""
        if not self._front.alive:
            return
        self._dials += 1
        self._handle(StreamDialled())
        self._front.after(self._front.settings.front_limits.connect_timeout_s, self._on_connect_timeout, self._dials)
        self._cluster.dial(self._front, address)

    def connected(self, scheduler: SimScheduler, stream: Stream) -> None:
        """A stream came about; the scheduler may speak on it."""
        self.scheduler, self.session, self.stream = scheduler, 0, stream

    def numbered(self, stream: Stream, session: int) -> None:
        """The scheduler's own number of the stream."""
        if stream is self.stream:
            self.session = session

    def on_refused(self, stream: Stream) -> None:
        """The scheduler stands by."""
        if stream is self.stream and self._front.alive:
            stream.drop(DOWN)
            self.on_lost(stream, "it stands by")

    def hear(self, word: ReplyPlan | ReplyRefusal | ReplyWaiting | ViewShown, leader_epoch: int = 0) -> None:
        """The scheduler says something on the stream."""
        if self._front.alive:
            self._true_s = self._world.now_s
            if isinstance(word, ReplyWaiting):
                self._waits_until_s[word.plan_id] = self._world.now_s + word.wait_max_s
                self._answers_by_s[word.plan_id] = self._world.now_s + word.wait_max_s + self._patience_s
            elif isinstance(word, ReplyPlan | ReplyRefusal):
                self._answers_by_s.pop(word.plan_id, None)
            self._handle(MessageReceived(word, leader_epoch))

    def see(self, view: ViewShown, leader_epoch: int) -> None:
        """The scheduler shows the cluster, which it does again and again."""
        self.hear(view, leader_epoch)

    def on_lost(self, stream: Stream | None, reason: str, *, silent: bool = False) -> None:
        """The stream broke, or none came about (None)."""
        if not self._front.alive or stream is not self.stream:
            return
        self.stream = self.scheduler = None
        self._waits_until_s.clear()
        self._answers_by_s.clear()
        # A dial that is over has no timeout any more.
        self._dials += 1
        self._handle(StreamLost(reason, silent=silent))

    def crash(self) -> None:
        """The front proxy is gone."""
        self.stream = self.scheduler = None
        self._clients.clear()

    def _on_connect_timeout(self, dial: int) -> None:
        if self._front.alive and dial == self._dials and not self.plan_client.connected:
            self._leave("it did not answer in time", silent=True)

    def _leave(self, reason: str, *, silent: bool) -> None:
        stream = self.stream
        if stream is not None:
            stream.drop(DOWN)
        self.on_lost(stream, reason, silent=silent)

    # From the requests

    def ask(self, client: Client, ask: AskPlan) -> int:
        """Where should it run?"""
        plan_id = self._next_plan_id
        self._next_plan_id += 1
        self._clients[plan_id] = (client, ask)
        asked = client.asked
        question = PlanRequested(
            session=0,
            plan_id=plan_id,
            request_id=asked.request_id,
            prompt_tokens=asked.prompt_tokens + ask.resume_tokens,
            output_tokens_max=asked.output_tokens_max - ask.resume_tokens,
            excluded_worker_ids=frozenset(ask.excluded_worker_ids),
            pinned_decode_worker_id=ask.pinned_decode_worker,
            wait_max_s=max(asked.arrives_s + asked.deadline_s - self._world.now_s, 0.001),
            prefill_only=ask.prefill_only,
            resumed=ask.resumed,
        )
        self._handle(PlanNeeded(question))
        return plan_id

    def end(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        """Free what a plan reserved."""
        self._clients.pop(plan_id, None)
        self.answered_s.pop(plan_id, None)
        self._waits_until_s.pop(plan_id, None)
        self._answers_by_s.pop(plan_id, None)
        self._handle(PlanEnded(plan_id, outcome, output_tokens))

    def suspect(self, worker_id: str, epoch: int) -> None:
        """A worker could not be used."""
        self._handle(Suspected(worker_id, epoch, "lost"))

    # The plan client

    def _handle(self, event: PlanClientEvent) -> None:
        was_connected = self.plan_client.connected
        self._actions.extend(self.plan_client.handle(event, self._world.now_s))
        self.plan_client.check()
        if was_connected != self.plan_client.connected:
            self.connected_s = NEVER_S if was_connected else self._world.now_s
            self._true_s = self._world.now_s
            self._check_silence()
        if not self._busy:
            self._busy = True
            while self._actions:
                self._do(self._actions.popleft())
            self._busy = False
        if self.plan_client.wake_s < self._alarm_s:
            self._alarm_s = self.plan_client.wake_s
            self._front.after(max(self._alarm_s - self._world.now_s, 0.0), self._on_alarm, self._alarm_s)

    def _on_alarm(self, alarm_s: float) -> None:
        if alarm_s == self._alarm_s and self._front.alive:
            self._alarm_s = NEVER_S
            self._handle(TimerFired())

    def _do(self, action: PlanClientAction) -> None:
        match action:
            case SendQuestion() | SendEnd() | SendRunning() | SendSuspect():
                self._send(action)
            case AnswerPlan():
                self._answer(action)
            case AnswerRefusal(plan_id=plan_id, failure=failure):
                if (asked := self._clients.pop(plan_id, None)) is not None:
                    asked[0].feed(PlanRefused(attempt=asked[1].attempt, failure=failure))
            case ViewChanged(gone=gone):
                for worker_id, epoch in gone:
                    self._front.forget(worker_id, epoch)
            case Leave(reason=reason):
                self._world.tell(self._front.name, f"leaves the scheduler: {reason}")
                self._front.after(0.0, self._leave_soon, self.stream, reason)
            case Dial(address=address, after_s=after_s):
                self._front.after(after_s, self.dial, address)
            case OutageBegan() | OutageOver() | SchedulerLost():
                self._world.tell(self._front.name, action)
            case _:
                assert_never(action)

    def _leave_soon(self, stream: Stream | None, reason: str) -> None:
        if stream is not None and stream is self.stream and self._front.alive:
            self._leave(reason, silent=False)

    def _send(self, action: SendQuestion | SendEnd | SendRunning | SendSuspect) -> None:
        stream, scheduler = self.stream, self.scheduler
        if stream is None or scheduler is None:
            return
        match action:
            case SendQuestion(question=question):
                self._answers_by_s[question.plan_id] = self._world.now_s + self._patience_s
                stream.send(UP, scheduler.on_plan, msgspec.structs.replace(question, session=self.session))
            case SendEnd(plan_id=plan_id, outcome=outcome, output_tokens=output_tokens):
                self._answers_by_s.pop(plan_id, None)
                ended = (self.session, plan_id, outcome, output_tokens)
                stream.send(UP, scheduler.on_ended, *ended)
                if self._world.rng.random() < self._front.faults.repeat:
                    stream.send(UP, scheduler.on_ended, *ended)
            case SendRunning(plans=plans, asked=asked, complete=complete):
                told = PlansRunning(session=self.session, plans=tuple(plans), asked=frozenset(asked), complete=complete)
                stream.send(UP, scheduler.on_running, told)
            case SendSuspect(worker_id=worker_id, epoch=epoch):
                stream.send(UP, scheduler.on_suspect, worker_id, epoch)
            case _:
                assert_never(action)

    def _answer(self, answer: AnswerPlan) -> None:
        plan, now_s = answer.plan, self._world.now_s
        asked = self._clients.pop(plan.plan_id, None)
        if asked is None:
            return
        client, ask = asked
        if answer.local:
            self._check_planned_locally(plan.plan_id, client.asked.request_id)
        self.answered_s[plan.plan_id] = now_s
        client.feed(Planned(attempt=ask.attempt, plan=plan))

    def _check_silence(self) -> None:
        """Whoever is taken to be silent owes an answer: who was told to wait lost his turn by that."""
        if self.plan_client.connected or self.stream is None:
            return
        if min(self._answers_by_s.values(), default=NEVER_S) > self._world.now_s:
            raise Violation("a scheduler is taken to be silent that owes nobody an answer yet")

    def _check_planned_locally(self, plan_id: int, request_id: str) -> None:
        now_s = self._world.now_s
        self._world.tell(self._front.name, f"plans {request_id} itself")
        age_s = now_s - self._true_s
        if age_s > self._view_max_age_s:
            raise Violation(f"{request_id} is planned from a view that was true {age_s:.3f} s ago")
        # Nobody waits for his turn with a scheduler that is silent.
        if self.plan_client.connected and now_s < self._waits_until_s.get(plan_id, 0.0):
            raise Violation(f"{request_id} does not wait for its turn")
