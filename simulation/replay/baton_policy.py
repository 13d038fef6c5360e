"""Baton's own policy: the production scheduler behind the interface of the replay, without a rule of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import assert_never

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import GONE, BlockDelta, Medium
from scheduler.api.actions import ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.chance import Random
from scheduler.api.events import (
    Event,
    FrontJoined,
    PlanRequested,
    WorkerBlocksReported,
    WorkerJoined,
    WorkerLoadReported,
    WorkerProgressReported,
)
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

_DECIDED = (ReplyPlan, ReplyWaiting, ReplyRefusal)
_Told = WorkerRegistered | KvChanged | RequestArrived | RequestEnded | Tick


class Baton:
    """``SchedulerCore`` with one front proxy."""

    def __init__(self, rng: Random, config: SchedulerConfig | None = None) -> None:
        self.core = SchedulerCore(config or SchedulerConfig(), rng)
        self.core.handle(FrontJoined(session=FRONT, front_proxy_id="replay"), 0.0)
        self._sessions: dict[str, int] = {}
        # Deltas that each worker sent.
        self._deltas: Counter[str] = Counter()

    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        """Translate, ask the core, translate back."""
        if isinstance(event, LoadReported):
            worker_id, session = event.worker_id, self._sessions[event.worker_id]
            if event.steps:
                self.core.handle(WorkerProgressReported(session=session, worker_id=worker_id, steps=event.steps), now_s)
            told: Event = WorkerLoadReported(session=session, worker_id=worker_id, load=event.load)
        elif isinstance(event, FirstToken):
            # No message tells a scheduler of it.
            return ()
        else:
            told = self._told(event)
        actions = self.core.handle(told, now_s)
        # Mostly it is a new view for front proxies, and nothing else.
        return [_decision(action) for action in actions if isinstance(action, _DECIDED)] if actions else ()

    def _told(self, event: _Told) -> Event:
        match event:
            case KvChanged(worker_id=worker_id):
                session = self._sessions[worker_id]
                return WorkerBlocksReported(session=session, worker_id=worker_id, delta=self._delta(event))
            case RequestArrived(request=request):
                self.core.prefixes.key_tokens = request.key_tokens
                return PlanRequested(
                    session=FRONT,
                    plan_id=request.request_id,
                    request_id=str(request.request_id),
                    prompt_tokens=request.prompt_tokens,
                    output_tokens_max=request.output_tokens_max,
                    tenant=request.tenant,
                    priority_class=request.priority_class,
                    block_keys=block_keys.pack_keys(request.block_keys),
                    ttft_slo_s=request.ttft_slo_s,
                    itl_slo_s=request.itl_slo_s,
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

    def _delta(self, event: KvChanged) -> BlockDelta:
        self._deltas[event.worker_id] += 1
        seq = self._deltas[event.worker_id]
        levels = {
            level: block_keys.pack_keys(keys)
            for level, keys in ((Medium.HBM, event.stored), (GONE, event.removed))
            if keys
        }
        return BlockDelta(epoch=1, seq=seq, reset=seq == 1, levels=levels)


def _decision(action: ReplyPlan | ReplyWaiting | ReplyRefusal) -> Decision:
    match action:
        case ReplyPlan(plan_id=plan_id, prefill=prefill, decode=decode):
            assert decode is not None, "no request was asked to be computed only"
            return Run(plan_id, prefill.worker_id if prefill is not None else None, decode.worker_id)
        case ReplyWaiting(plan_id=plan_id):
            return Wait(plan_id)
        case ReplyRefusal(plan_id=plan_id, cause=cause):
            return Refuse(plan_id, cause)
        case _:
            assert_never(action)
