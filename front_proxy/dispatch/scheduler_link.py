"""The front proxy's stream to the scheduler, over gRPC. Performs what ``plan_client`` decides."""

from __future__ import annotations

import asyncio
import collections
import random
from collections.abc import Callable, Sequence
from typing import assert_never

import structlog

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch import wire
from front_proxy.dispatch.accounts_link import AccountsLink
from front_proxy.planning.cluster_view import ClusterView
from front_proxy.planning.events import (
    AnswerPlan,
    AnswerRefusal,
    Closed,
    DialAgain,
    Leave,
    MessageReceived,
    OutageBegan,
    OutageOver,
    PlanClientAction,
    PlanClientEvent,
    PlanEnded,
    PlanNeeded,
    SendEnd,
    SendQuestion,
    SendRunning,
    SendSuspect,
    StreamLost,
    Suspected,
    TimerFired,
    ViewChanged,
)
from front_proxy.planning.plan_client import NEVER_S, PlanClient
from front_proxy.request.bill import Part
from front_proxy.request.events import Measured, Outcome
from protos.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import Dial
from runtime.rpc.grpc_stream import grpc_dial
from runtime.rpc.send_queue import SendQueue, exchange
from scheduler.api.actions import Placement
from scheduler.api.events import PlanRequested, RunningPlan
from scheduler.config import SchedulerConfig

log = structlog.get_logger(__name__)

ALARM_LATE_S = 0.05
"""An alarm later than this says that the loop was busy, with hundreds of requests at once, or stood still."""
LATE_ALARMS_MAX = 10
"""Late alarms in a row after which the loop counts as able to hear, however busy it is."""


PlanReceiver = Callable[[RunningPlan | Failure], None]
"""Gets the one answer to one question. A failure: it may not run, or no answer came in time; nothing is reserved."""
_Item = scheduler_pb2.FrontUpdates


class SchedulerLink:
    """Questions in, answers out through their receivers; ``run`` holds the stream."""

    def __init__(
        self,
        config: FrontProxyConfig,
        limits: FrontProxyLimits,
        view: ClusterView,
        *,
        front_proxy_id: str,
        on_view: Callable[[], None],
        on_gone: Callable[[str, int], None],
        on_lost: Callable[[str], None],
        on_degraded: Callable[[str], None],
        policy: SchedulerConfig,
        dial: Dial | None = None,
        rng: random.Random | None = None,
        accounts: AccountsLink | None = None,
    ) -> None:
        """``accounts``: None where there are neither keys nor accounts.

        ``on_degraded`` is told "planned" or "refused" for every request planned without the scheduler.
        """
        self._config = config
        self._limits = limits
        self._front_proxy_id = front_proxy_id
        self._on_view = on_view
        self._on_gone = on_gone
        self._on_lost = on_lost
        self._on_degraded = on_degraded
        self._dial = dial or grpc_dial(
            lambda channel: scheduler_pb2_grpc.SchedulerServiceStub(channel).FrontSession(),
            message_bytes_max=limits.message_bytes_max,
            quick_keepalive="," in config.scheduler_address,
        )
        rng = rng or random.Random()
        self._plan_client = PlanClient(config, limits, view=view, policy=policy, rng=rng)
        self._loop = asyncio.get_running_loop()
        # Never 0, which says nothing.
        self._incarnation = rng.getrandbits(64) or 1
        self._sending: SendQueue[_Item] | None = None
        # Each with its question as it goes over the wire.
        self._receivers: dict[int, tuple[PlanReceiver, _Item]] = {}
        self._next_plan_id = 0
        self._actions: collections.deque[PlanClientAction] = collections.deque()
        self._busy = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = NEVER_S
        self._late_alarms = 0
        self._dial_after_s = 0.0
        self._accounts = accounts
        if accounts is not None:
            accounts.send, accounts.on_keys = self._send_if_heard, on_view

    @property
    def connected(self) -> bool:
        """Whether the scheduler is on the line and answers."""
        return self._plan_client.connected

    @property
    def degraded(self) -> bool:
        """Whether requests are planned here."""
        return self._plan_client.degraded

    @property
    def unanswered(self) -> int:
        """Questions that wait for their answer."""
        return self._plan_client.unanswered

    def new_plan_id(self) -> int:
        """An id for the next question, unique in this process."""
        self._next_plan_id += 1
        return self._next_plan_id

    def plan(self, question: PlanRequested, receiver: PlanReceiver, part: Part | None = None) -> None:
        """Ask the scheduler. The answer comes later, through ``receiver``; what it grants to ``part`` before that."""
        if part is not None and self._accounts is not None:
            self._accounts.asked(question.plan_id, part)
        # First, so that a question that cannot be encoded is never asked.
        self._receivers[question.plan_id] = (receiver, wire.plan_request(question))
        self._handle(PlanNeeded(question))

    def end_plan(self, plan_id: int, outcome: Outcome, output_tokens: int, measured: Measured | None = None) -> None:
        """Free what a plan reserved. Of a question not answered yet, its answer too."""
        self._receivers.pop(plan_id, None)
        if self._accounts is not None:
            self._accounts.forget(plan_id)
        self._handle(PlanEnded(plan_id, outcome, output_tokens, measured))

    def extend(self, part: Part) -> None:
        """Ask for more output of a request that runs."""
        if self._accounts is not None:
            self._accounts.extend(part)

    def grant_away(self, part: Part) -> bool:
        """Grant more output without the scheduler. False: that is not wanted."""
        return self._accounts is None or self._accounts.grant_away(part)

    def suspect(self, worker: Placement, reason: str) -> None:
        """Tell the scheduler that a worker could not be used."""
        self._handle(Suspected(worker.worker_id, worker.epoch, reason))

    async def run(self) -> None:
        """Keep a stream to the scheduler until cancelled."""
        try:
            while True:
                await self._one_stream()
                if self._dial_after_s:
                    await asyncio.sleep(self._dial_after_s)
        finally:
            if self._accounts is not None:
                self._accounts.close()
            self._handle(Closed())

    async def _one_stream(self) -> None:
        self._sending = sending = SendQueue[_Item](self._config.send_messages_max)
        try:
            ended = await exchange(
                self._dial,
                self._plan_client.address,
                sending,
                # Nothing behind it until it is answered: a write that meets a refusal would hide what the refusal says.
                opening=wire.registration(self._front_proxy_id, self._incarnation),
                on_message=self._on_message,
                first_timeout_s=self._limits.connect_timeout_s,
            )
        finally:
            self._sending = None
            if self._accounts is not None:
                self._accounts.lost()
        self._handle(StreamLost(str(ended), silent=ended.silent))

    def _on_message(self, replies: scheduler_pb2.FrontReplies) -> None:
        for reply in replies.messages:
            kind = reply.WhichOneof("message")
            if self._accounts is not None:
                self._accounts.hear(kind, reply)
            self._handle(MessageReceived(wire.word(kind, reply), replies.leader_epoch))

    def _handle(self, event: PlanClientEvent) -> None:
        """Let the plan client decide, and do what it says, behind what is being done now."""
        actions = self._plan_client.handle(event, self._loop.time())
        if self._busy:
            self._actions.extend(actions)
        elif actions:
            self._perform(actions)
        if self._plan_client.wake_s < self._alarm_s and not self._late_alarms:
            self._set_alarm(self._plan_client.wake_s)

    def _perform(self, actions: Sequence[PlanClientAction]) -> None:
        self._busy = True
        try:
            for action in actions:
                self._do(action)
            while self._actions:
                self._do(self._actions.popleft())
        finally:
            self._busy = False

    def _set_alarm(self, at_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = at_s
        self._alarm = self._loop.call_at(at_s, self._on_alarm)

    def _on_alarm(self) -> None:
        now_s = self._loop.time()
        if now_s - self._alarm_s > ALARM_LATE_S and self._late_alarms < LATE_ALARMS_MAX:
            # This process was busy or stood still. Answers may be here that it has not read yet: they come first.
            self._late_alarms += 1
            self._set_alarm(now_s + self._limits.plan_patience_s)
            return
        self._late_alarms = 0
        self._alarm, self._alarm_s = None, NEVER_S
        self._handle(TimerFired())

    def _do(self, action: PlanClientAction) -> None:
        match action:
            case SendQuestion(question=question):
                # Its request may have left while other things were done; then no answer is wanted.
                if (asked := self._receivers.get(question.plan_id)) is not None:
                    if self._accounts is not None:
                        self._accounts.tell_with(asked[1].messages[0].plan)
                    self._send(asked[1])
            case AnswerPlan(plan=plan, local=local):
                if local:
                    self._on_degraded("planned")
                if (asked := self._receivers.pop(plan.plan_id, None)) is not None:
                    asked[0](plan)
            case SendEnd(plan_id=plan_id, outcome=outcome, output_tokens=output_tokens, measured=measured):
                self._send(wire.request_ended(plan_id, outcome, output_tokens, measured), patient=True)
            case AnswerRefusal(plan_id=plan_id, failure=failure, local=local):
                if local:
                    self._on_degraded("refused")
                if (asked := self._receivers.pop(plan_id, None)) is not None:
                    asked[0](failure)
            case ViewChanged(gone=gone):
                for worker_id, epoch in gone:
                    self._on_gone(worker_id, epoch)
                self._on_view()
            case SendRunning() | SendSuspect() | Leave() | DialAgain() | OutageBegan() | OutageOver():
                self._do_seldom(action)
            case _:
                assert_never(action)

    def _do_seldom(self, action: SendRunning | SendSuspect | Leave | DialAgain | OutageBegan | OutageOver) -> None:
        match action:
            case SendRunning(plans=plans, asked=asked_ids, complete=complete):
                if complete and self._accounts is not None:
                    self._accounts.begin()
                self._send(wire.plans_running(plans, asked=asked_ids, complete=complete))
            case SendSuspect():
                self._send(wire.suspect(action.worker_id, action.epoch, action.reason))
            case Leave(reason=reason):
                if self._sending is not None:
                    self._sending.close(Failure(kind=FailureKind.UNAVAILABLE, message=reason))
            case DialAgain(after_s=after_s, reason=reason, lost=lost):
                if lost:
                    self._on_lost(reason)
                again = {"reason": reason, "again_in_s": round(after_s, 3)}
                log.warning("no stream to the scheduler", **again)
                self._dial_after_s = after_s
            case OutageBegan(why=why, view_age_s=view_age_s):
                told = {"why": why, "view_age_s": round(view_age_s, 3)}
                log.warning("planning without the scheduler", **told)
            case OutageOver(plans_made=plans_made):
                log.warning("the scheduler plans again", planned_without_it=plans_made)
            case _:
                assert_never(action)

    def _send_if_heard(self, item: _Item) -> bool:
        """Send to a scheduler that answers. False: there is none."""
        return self._plan_client.connected and self._sending is not None and self._sending.put(item)

    def _send(self, item: _Item, *, patient: bool = False) -> None:
        if self._sending is not None:
            self._sending.put(item, patient=patient)
