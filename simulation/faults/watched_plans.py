"""Looks over the shoulder of a front proxy's plan client, and checks what it decides. Decides nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from front_proxy.planning.events import (
    AnswerPlan,
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
    StreamLost,
)
from front_proxy.planning.plan_client import NEVER_S, PlanClient
from scheduler.api.actions import ReplyPlan, ReplyRefusal, ReplyWaiting
from simulation.kernel.world import Violation

if TYPE_CHECKING:
    from simulation.faults.processes import FrontProcess

_TOLD = (DialAgain, Leave, OutageBegan, OutageOver)


class WatchedPlans:
    """Of one front proxy."""

    def __init__(self, front: FrontProcess) -> None:
        self.connected_s = NEVER_S
        """Since when the scheduler answers on its stream."""
        self.answered_s: dict[int, float] = {}
        """When each plan that runs was given to its request."""
        self.plan_client: PlanClient = front.dispatcher._scheduler._plan_client
        self._front = front
        self._world = front.world
        config, limits = front.config, front.limits
        self._view_max_age_s = limits.degraded_view_max_age_s
        self._patience_s = min(limits.plan_patience_s, config.plan_timeout_s)
        self.open = False
        self._questions: dict[int, str] = {}
        # Until when the last view was true at most, as seen from outside, and which plan waits for its turn until when.
        self._true_s = 0.0
        self._waits_until_s: dict[int, float] = {}
        # When the scheduler should have answered each question that it was asked on this stream.
        self._answers_by_s: dict[int, float] = {}
        self._handle = self.plan_client.handle
        self.plan_client.handle = self._world.watched(self._watched)  # type: ignore[method-assign]

    def _watched(self, event: PlanClientEvent, now_s: float) -> Sequence[PlanClientAction]:
        was_connected = self.plan_client.connected
        self._before(event, now_s)
        actions = self._handle(event, now_s)
        self.plan_client.check()
        if was_connected != self.plan_client.connected:
            self.connected_s = NEVER_S if was_connected else now_s
            self._true_s = now_s
            if was_connected and self.open and min(self._answers_by_s.values(), default=NEVER_S) > now_s:
                raise Violation("a scheduler is taken to be silent that owes no answer yet")
        for action in actions:
            self._after(action, now_s)
        return actions

    def _before(self, event: PlanClientEvent, now_s: float) -> None:
        match event:
            case PlanNeeded(question=question):
                self._questions[question.plan_id] = question.request_id
            case MessageReceived(word=word):
                self.open = True
                self._true_s = now_s
                if isinstance(word, ReplyWaiting):
                    self._waits_until_s[word.plan_id] = now_s + word.wait_max_s
                    self._answers_by_s[word.plan_id] = now_s + word.wait_max_s + self._patience_s
                elif isinstance(word, ReplyPlan | ReplyRefusal):
                    self._answers_by_s.pop(word.plan_id, None)
            case StreamLost():
                self.open = False
                self._waits_until_s.clear()
                self._answers_by_s.clear()
            case PlanEnded(plan_id=plan_id):
                for about in (self._questions, self.answered_s, self._waits_until_s, self._answers_by_s):
                    about.pop(plan_id, None)
            case _:
                pass

    def _after(self, action: PlanClientAction, now_s: float) -> None:
        match action:
            case SendQuestion(plan_id=plan_id):
                self._answers_by_s[plan_id] = now_s + self._patience_s
            case SendEnd(plan_id=plan_id):
                self._answers_by_s.pop(plan_id, None)
            case AnswerPlan(plan=plan, local=local):
                self.answered_s[plan.plan_id] = now_s
                if local:
                    self._check_planned_locally(plan.plan_id, now_s)
            case _ if self._world.logs_events and isinstance(action, _TOLD):
                self._world.log(self._front.name, action)
            case _:
                pass

    def _check_planned_locally(self, plan_id: int, now_s: float) -> None:
        request_id = self._questions.get(plan_id, "")
        self._world.log(self._front.name, f"plans {request_id} itself")
        age_s = now_s - self._true_s
        if age_s > self._view_max_age_s:
            raise Violation(f"{request_id} is planned from a view that was true {age_s:.3f} s ago")
        # With a scheduler that is silent no request waits for its turn.
        if self.plan_client.connected and now_s < self._waits_until_s.get(plan_id, 0.0):
            raise Violation(f"{request_id} does not wait for its turn")
