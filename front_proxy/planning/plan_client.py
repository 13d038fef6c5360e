"""A front proxy's side of the scheduler's protocol: where a request is planned, what is sent, what is dialled. Pure.

Events in, actions out. Time is an argument that never goes back; randomness is an argument too. ``scheduler_link`` is
its shell. What becomes of a question:

    asked while the scheduler answers, or without a view          -> waits for its answer, ``plan_patience_s`` at first
    asked while it does not, with a view to plan from             -> is planned here at the next wake-up
    queued by the scheduler                                       -> waits as long as it said, and ``plan_patience_s``
    patience over or stream lost, with a view to plan from        -> is planned here, and all others that wait
    planned here and no worker has room                           -> is refused with Retry-After
    patience over without a view                                  -> waits until ``plan_timeout_s`` is over: refused

A *resumed* question belongs to a request that a worker failed, perhaps in the middle of its stream. It is planned here
after ``plan_patience_s``: by then every connection that the same fault broke has been noticed. If no worker has room,
it is tried again every ``plan_patience_s``. These tries may use every worker. If the scheduler answers again, it is
asked. When ``plan_timeout_s`` is over, the question is refused.

The scheduler **answers** when its stream is open (it has spoken), it is not silent (no question ran out of patience
since it last spoke), and it knows all workers that are known here (after a restart it may be recovering). The stream of
one that stays silent for ``plans_told_interval_s`` is ended and dialled again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import msgspec

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
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
    ViewShown,
)
from front_proxy.planning.fallback_planner import FallbackPlanner
from runtime.failures import Failure, FailureKind
from runtime.rpc.addresses import Addresses
from runtime.timing.backoff import backoff_s
from scheduler.api.actions import ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.chance import Random
from scheduler.api.events import PlanRequested, RunningPlan
from scheduler.config import SchedulerConfig

NEVER_S = float("inf")


class _Pending(msgspec.Struct, gc=False):
    """A question to the scheduler without an answer yet.

    ``sent``: on the stream that is open now, so an end must follow it there. ``due_s``: when something is done about it
    next. ``until_s``: when it is refused at the latest. ``queued_s``: until when the scheduler that has it queues it.
    """

    question: PlanRequested
    due_s: float
    until_s: float
    sent: bool = False
    queued_s: float = -NEVER_S


class PlanClient:
    """Feed it events, do what the actions say in order, and tell it ``TimerFired`` at ``wake_s``."""

    def __init__(
        self,
        config: FrontProxyConfig,
        limits: FrontProxyLimits,
        *,
        view: ClusterView,
        policy: SchedulerConfig,
        rng: Random,
    ) -> None:
        """``policy``: the scheduler's settings."""
        self.wake_s = NEVER_S
        """When something is due next unless an event comes before; changes with every event."""
        self._config = config
        self._limits = limits
        self._view = view
        self._rng = rng
        self._plans = FallbackPlanner(
            policy,
            view,
            view_max_age_s=limits.degraded_view_max_age_s,
            load_fade_s=limits.degraded_load_fade_s,
            rng=rng,
        )
        self._addresses = Addresses(config.scheduler_address)
        # The largest that a scheduler named. An older leader may have been paused, and not know that it was replaced.
        self._leader_epoch = 0
        self._pending: dict[int, _Pending] = {}
        self._opened = False
        self._silent = False
        self._tell_s = NEVER_S
        self._dials_failed = 0

    @property
    def connected(self) -> bool:
        """Whether the scheduler is on the line and answers."""
        return self._opened and not self._silent

    @property
    def degraded(self) -> bool:
        """Whether requests are planned here."""
        return self._plans.active

    @property
    def address(self) -> str:
        """The address to dial."""
        return self._addresses.current

    @property
    def running(self) -> Mapping[int, RunningPlan]:
        """Every plan in flight, of the scheduler or made locally."""
        return self._plans.running

    @property
    def unanswered(self) -> int:
        """Questions that wait for their answer."""
        return len(self._pending)

    def handle(self, event: PlanClientEvent, now_s: float) -> Sequence[PlanClientAction]:
        """What follows from one event."""
        match event:
            case PlanNeeded():
                return self._ask(event, now_s)
            case MessageReceived():
                return self._hear(event, now_s)
            case PlanEnded():
                return self._end(event, now_s)
            case Suspected(worker_id=worker_id, epoch=epoch, reason=reason):
                self._plans.suspect(worker_id, epoch, reason, now_s)
                return (SendSuspect(worker_id, epoch, reason),) if self.connected else ()
            case TimerFired():
                return self._wake(now_s)
            case StreamLost():
                return self._lose(event, now_s)
            case Closed():
                return self._close(now_s)
            case _:
                assert_never(event)

    # Of the requests

    def _ask(self, event: PlanNeeded, now_s: float) -> Sequence[PlanClientAction]:
        plan_id = event.question.plan_id
        assert plan_id not in self._pending and plan_id not in self._plans.running, plan_id
        possible = self._plans.possible(now_s)
        pending = _Pending(event.question, now_s, now_s + self._config.plan_timeout_s)
        self._pending[plan_id] = pending
        if self.connected and not (self._view.knows_more and possible):
            return (self._send(pending, now_s),)
        if pending.question.resumed or not possible:
            pending.due_s = now_s + self._patience_s
        # Planned here at the next wake-up, not now: the request does not expect the answer before it has asked.
        self._wake_by(pending.due_s)
        return ()

    def _end(self, event: PlanEnded, now_s: float) -> Sequence[PlanClientAction]:
        """If the question is still open, this end frees its later answer too, because messages stay in order."""
        pending = self._pending.pop(event.plan_id, None)
        self._plans.ended(event.plan_id, event.outcome, event.output_tokens, now_s)
        # A silent scheduler is told everything at once when it speaks; until then nothing piles up.
        if self.connected or (pending is not None and pending.sent):
            return (SendEnd(event.plan_id, event.outcome, event.output_tokens, event.measured),)
        return ()

    # Of the scheduler

    @property
    def _answers(self) -> bool:
        """Whether the scheduler is asked. One that is recovering may know less than we do."""
        return self.connected and not self._view.knows_more

    def _hear(self, event: MessageReceived, now_s: float) -> Sequence[PlanClientAction]:
        if 0 < event.leader_epoch < self._leader_epoch:
            return (Leave("it led once, and another one leads now"),)
        self._leader_epoch = max(self._leader_epoch, event.leader_epoch)
        actions: list[PlanClientAction] = [] if self.connected else self._catch_up(now_s)
        match event.word:
            case ReplyPlan():
                self._grant(event.word, actions, now_s)
            case ReplyRefusal(plan_id=plan_id, failure=failure):
                # Its request may have left: then its end was sent already.
                if self._pending.pop(plan_id, None) is not None:
                    actions.append(AnswerRefusal(plan_id, failure))
            case ReplyWaiting(plan_id=plan_id, wait_max_s=wait_max_s):
                self._queue(plan_id, wait_max_s, now_s)
            case ViewShown():
                actions.extend(self._see(event.word, now_s))
            case None:
                pass
            case _:
                assert_never(event.word)
        if self._plans.active and self._answers:
            actions.append(OutageOver(self._plans.resume()))
        return actions

    def _catch_up(self, now_s: float) -> list[PlanClientAction]:
        """It speaks, for the first time or again: say what runs, and send the questions that were not sent yet.

        A scheduler releases everything of a stream that ended, and on a new stream it was asked nothing.
        """
        self._opened, self._silent = True, False
        self._tell_s = now_s + self._limits.plans_told_interval_s
        self._wake_by(self._tell_s)
        for pending in self._pending.values():
            if pending.sent:
                self._await(pending, now_s)
            else:
                # At the next wake-up: what it says now may be that it is recovering.
                pending.due_s = min(now_s, pending.until_s)
                self._wake_by(pending.due_s)
        return [self._all_that_runs()]

    def _grant(self, word: ReplyPlan, actions: list[PlanClientAction], now_s: float) -> None:
        pending = self._pending.pop(word.plan_id, None)
        if pending is None:
            return
        plan = RunningPlan(
            plan_id=word.plan_id,
            request_id=pending.question.request_id,
            prefill=word.prefill,
            decode=word.decode,
            decode_blocks=word.decode_blocks_reserved,
        )
        self._plans.granted(plan, now_s)
        actions.append(AnswerPlan(plan))

    def _queue(self, plan_id: int, wait_max_s: float, now_s: float) -> None:
        """The scheduler queues the request: it answers within that time, or it is not well."""
        pending = self._pending.get(plan_id)
        if pending is None:
            return
        pending.queued_s = now_s + wait_max_s
        pending.due_s = pending.queued_s + self._limits.plan_patience_s
        pending.until_s = max(pending.due_s, pending.queued_s + self._config.plan_timeout_s)
        self._wake_by(pending.due_s)

    def _see(self, view: ViewShown, now_s: float) -> Sequence[PlanClientAction]:
        change = self._view.apply(view.workers, recovering=view.recovering)
        self._plans.view_changed(change.told, now_s)
        return (ViewChanged(change.gone),)

    def _lose(self, event: StreamLost, now_s: float) -> Sequence[PlanClientAction]:
        if self._answers:
            self._plans.still_true(now_s)
        had_spoken, self._opened, self._silent = self._opened, False, False
        self._tell_s = NEVER_S
        self._expect_no_answers(now_s)
        for pending in self._pending.values():
            pending.sent = False
        if had_spoken:
            self._dials_failed = 0
            self._addresses.served()
        after_s = 0.0
        if self._addresses.failed(silent=event.silent):
            # Many front proxies lose one scheduler at one moment; they must not all return at one moment.
            self._dials_failed += 1
            limits = self._limits
            pause_s = backoff_s(
                self._dials_failed, min_s=limits.scheduler_backoff_min_s, max_s=limits.scheduler_backoff_max_s
            )
            after_s = pause_s * (0.5 + 0.5 * self._rng.random())
        return (DialAgain(self._addresses.current, after_s, event.reason, had_spoken),)

    # Of time

    def _wake_by(self, due_s: float) -> None:
        if due_s < self.wake_s:
            self.wake_s = due_s

    def _wake(self, now_s: float) -> Sequence[PlanClientAction]:
        actions: list[PlanClientAction] = []
        for plan_id in [plan_id for plan_id, pending in self._pending.items() if pending.due_s <= now_s]:
            actions.extend(self._overdue(plan_id, now_s))
        if self._tell_s <= now_s:
            # An end that got lost must not reserve for ever.
            self._tell_s = now_s + self._limits.plans_told_interval_s
            if self._silent:
                # Its answer may be lost, and it may have nothing else to say. On a new stream it speaks first.
                actions.append(Leave(f"it has said nothing for {self._limits.plans_told_interval_s:g} s"))
            else:
                actions.append(self._all_that_runs())
        # Computed here alone: removing a question may cause one needless wake-up, which is harmless.
        first_s = min((pending.due_s for pending in self._pending.values()), default=NEVER_S)
        self.wake_s = min(first_s, self._tell_s)
        return actions

    def _overdue(self, plan_id: int, now_s: float) -> Sequence[PlanClientAction]:
        """No answer came in time: plan here, or give the scheduler what is left of ``plan_timeout_s``."""
        pending = self._pending[plan_id]
        if pending.sent and self._answers:
            # The scheduler was connected until now. An unchanged view is not sent again, so an old one is still true.
            self._plans.still_true(now_s)
        possible = self._plans.possible(now_s)
        if not pending.sent and self.connected and (self._answers or not possible):
            # It could not be asked before, and now it can.
            return (self._send(pending, now_s),)
        if possible:
            if pending.sent:
                self._fall_silent(now_s)
            return self._plan_locally(plan_id, now_s)
        if now_s < pending.until_s:
            pending.due_s = pending.until_s
            return ()
        del self._pending[plan_id]
        away = "" if self._opened else " It is not reachable."
        text = f"The scheduler did not answer within {self._config.plan_timeout_s:g} s.{away}"
        refusal = AnswerRefusal(plan_id, Failure(kind=FailureKind.UNAVAILABLE, message=text))
        if not pending.sent:
            return (refusal,)
        self._fall_silent(now_s)
        return SendEnd(plan_id, "failed", 0), refusal

    def _fall_silent(self, now_s: float) -> None:
        if not self._silent:
            self._silent = True
            self._tell_s = now_s + self._limits.plans_told_interval_s
            self._expect_no_answers(now_s)

    def _expect_no_answers(self, now_s: float) -> None:
        """Questions on the stream would wait in vain, queued ones too: plan them at the next wake-up."""
        for pending in self._pending.values():
            if not pending.question.resumed:
                pending.due_s = min(now_s, pending.until_s)
            elif pending.sent:
                self._try_later(pending, now_s)
        self._wake_by(now_s)

    def _close(self, now_s: float) -> Sequence[PlanClientAction]:
        failure = Failure(kind=FailureKind.UNAVAILABLE, message="The front proxy stops.")
        waiting, self._pending = list(self._pending), {}
        self._opened = self._silent = False
        self.wake_s = self._tell_s = NEVER_S
        return [AnswerRefusal(plan_id, failure) for plan_id in waiting]

    # What both have in common

    def _send(self, pending: _Pending, now_s: float) -> SendQuestion:
        pending.sent, pending.queued_s = True, -NEVER_S
        self._await(pending, now_s)
        return SendQuestion(pending.question)

    def _await(self, pending: _Pending, now_s: float) -> None:
        """The scheduler has the question: give it its time to answer, however late it was asked."""
        pending.due_s = max(now_s, pending.queued_s) + self._patience_s
        pending.until_s = max(pending.until_s, pending.due_s)
        self._wake_by(pending.due_s)

    @property
    def _patience_s(self) -> float:
        return min(self._limits.plan_patience_s, self._config.plan_timeout_s)

    def _all_that_runs(self) -> SendRunning:
        return SendRunning(tuple(self._plans.running.values()), tuple(self._pending), complete=True)

    def _plan_locally(self, plan_id: int, now_s: float) -> Sequence[PlanClientAction]:
        pending = self._pending[plan_id]
        actions = list[PlanClientAction]()
        if not self._plans.active:
            why = "away" if not self._opened else "silent" if self._silent else "recovering"
            actions.append(OutageBegan(why, self._plans.view_age_s(now_s)))
            self._plans.begin(now_s)
        planned = self._plans.plan(pending.question, now_s)
        if isinstance(planned, ReplyRefusal) and self._may_wait(pending, planned.failure, now_s):
            pending.question = msgspec.structs.replace(pending.question, excluded_worker_ids=frozenset())
            self._try_later(pending, now_s)
            return actions
        del self._pending[plan_id]
        if pending.sent:
            # Behind the question on the same stream: should the answer still come, its reservation is freed.
            actions.append(SendEnd(plan_id, "failed", 0))
        if isinstance(planned, ReplyRefusal):
            actions.append(AnswerRefusal(plan_id, planned.failure, local=True))
            return actions
        if self.connected:
            actions.append(SendRunning((planned,), (), complete=False))
        actions.append(AnswerPlan(planned, local=True))
        return actions

    def _may_wait(self, pending: _Pending, failure: Failure, now_s: float) -> bool:
        return pending.question.resumed and failure.kind is not FailureKind.BAD_REQUEST and now_s < pending.until_s

    def _try_later(self, pending: _Pending, now_s: float) -> None:
        """A resumed request is planned here when ``plan_patience_s`` has passed."""
        pending.due_s = min(now_s + self._patience_s, pending.until_s)
        self._wake_by(pending.due_s)

    def check(self) -> None:
        """Assert every invariant. Slow: for tests."""
        self._plans.check()
        assert not self._silent or self._opened, "a stream that is not there is silent"
        for plan_id, pending in self._pending.items():
            assert plan_id not in self._plans.running, plan_id
            assert not pending.sent or self._opened, "a question was sent and there is no stream"
            assert self.wake_s <= pending.due_s <= pending.until_s, (plan_id, pending, self.wake_s)
        assert self.wake_s <= self._tell_s
        assert not (self._plans.active and self._answers), "an outage lasts while the scheduler answers"
