"""Baton's own policy: the production scheduler behind the interface of the replay, without a rule of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from scheduler.api.actions import Action, PublishView, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.chance import Random
from scheduler.api.events import Event, FrontJoined, PlanRequested, WorkerJoined, WorkerLoadReported
from scheduler.api.events import RequestEnded as PlanEnded
from scheduler.api.events import Tick as CoreTick
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from simulation.replay.policy import (
    Decision,
    FirstToken,
    KvChanged,
    LoadReported,
    PolicyEvent,
    Refuse,
    RequestArrived,
    RequestEnded,
    Run,
    Tick,
    Wait,
    WorkerRegistered,
)

FRONT = 1
"""The session of the one front proxy. Those of workers come after it."""

# The core has no use for them yet.
_NOT_LISTENED_TO = (KvChanged, FirstToken)
_Told = WorkerRegistered | LoadReported | RequestArrived | RequestEnded | Tick


class Baton:
    """``SchedulerCore`` with one front proxy."""

    def __init__(self, rng: Random, config: SchedulerConfig | None = None) -> None:
        self.core = SchedulerCore(config or SchedulerConfig(), rng)
        self.core.handle(FrontJoined(session=FRONT, front_proxy_id="replay"), 0.0)
        self._sessions: dict[str, int] = {}

    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        """Translate, ask the core, translate back."""
        if isinstance(event, _NOT_LISTENED_TO):
            return ()
        actions = self.core.handle(self._told(event), now_s)
        return [
            decision
            for action in actions
            if not isinstance(action, PublishView) and (decision := _decision(action)) is not None
        ]

    def _told(self, event: _Told) -> Event:
        match event:
            case LoadReported(worker_id=worker_id, load=load):
                return WorkerLoadReported(session=self._sessions[worker_id], worker_id=worker_id, load=load)
            case RequestArrived(request=request):
                return PlanRequested(
                    session=FRONT,
                    plan_id=request.request_id,
                    request_id=str(request.request_id),
                    prompt_tokens=request.prompt_tokens,
                    output_tokens_max=request.output_tokens_max,
                    tenant=request.tenant,
                    priority_class=request.priority_class,
                )
            case RequestEnded(request_id=request_id, output_tokens=tokens, finished=finished):
                outcome = "finished" if finished else "failed"
                return PlanEnded(session=FRONT, plan_id=request_id, outcome=outcome, output_tokens=tokens)
            case Tick():
                return CoreTick()
            case WorkerRegistered(info=info):
                session = self._sessions[info.worker_id] = FRONT + 1 + len(self._sessions)
                return WorkerJoined(session=session, info=info)
            case _:
                assert_never(event)


def _decision(action: Action) -> Decision | None:
    match action:
        case ReplyPlan(plan_id=plan_id, prefill=prefill, decode=decode):
            assert decode is not None, "no request was asked to be computed only"
            return Run(plan_id, prefill.worker_id if prefill is not None else None, decode.worker_id)
        case ReplyWaiting(plan_id=plan_id):
            return Wait(plan_id)
        case ReplyRefusal(plan_id=plan_id, cause=cause):
            return Refuse(plan_id, cause)
        case _:
            return None
