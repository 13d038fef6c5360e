"""A request flow played by hand, checked after every step. Holds no test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.protocol import Finish, FirstOutput
from front_proxy.request.events import (
    AskPlan,
    Emit,
    EndPlan,
    FinishRequest,
    FlowAction,
    FlowEvent,
    Output,
    Planned,
    ReleaseHandoff,
    RequestPhase,
    WorkerFailed,
)
from front_proxy.request.flow import RequestFlow
from front_proxy.request.work import Stage, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from scheduler.api.events import RunningPlan
from tests.support import workers

P0 = Placement(worker_id="prefill-0", address="p0", epoch=1)
D0 = Placement(worker_id="decode-0", address="d0", epoch=2)
LENGTH = Finish("length")
STOP = Finish("stop")


def handoff(lease_id: str = "lease-1") -> KvHandoff:
    return workers.handoff(lease_id=lease_id, epoch=P0.epoch)


def planned(attempt: int = 1, *, prefill: Placement | None = P0, decode: Placement | None = D0) -> Planned:
    plan = RunningPlan(plan_id=attempt, request_id="r", prefill=prefill, decode=decode, decode_blocks=5)
    return Planned(attempt=attempt, plan=plan)


def prefilled(attempt: int = 1, *tokens: int, finish: Finish = LENGTH, lease: str | None = "lease-1") -> Output:
    output = WorkerOutput(
        token_ids=list(tokens),
        finish=finish,
        first=FirstOutput(cached_tokens=16),
        handoff=handoff(lease) if lease else None,
    )
    return Output(attempt=attempt, stage=Stage.PREFILL, output=output)


def decoded(*tokens: int, attempt: int = 1, finish: Finish | None = None, external: int | None = None) -> Output:
    first = FirstOutput(cached_tokens=3, external_tokens=external) if external is not None else None
    output = WorkerOutput(token_ids=list(tokens), finish=finish, first=first)
    return Output(attempt=attempt, stage=Stage.DECODE, output=output)


def failed(
    stage: Stage, kind: FailureKind = FailureKind.UNAVAILABLE, attempt: int = 1, *, reached: bool = True
) -> WorkerFailed:
    failure = Failure(kind=kind, message="it broke", reached=reached)
    return WorkerFailed(attempt=attempt, stage=stage, failure=failure)


class Play:
    """A flow and everything it asked for, checked after every step."""

    def __init__(self, *events: FlowEvent, **options: Any) -> None:
        options = {
            "attempts_max": 3,
            "resumes_max": 2,
            "output_tokens_max": 16,
            "continuing": True,
            "budget": lambda: True,
            **options,
        }
        self.flow = RequestFlow(**options)
        self.actions: list[FlowAction] = list(self.flow.start())
        self.flow.check()
        self.tell(*events)

    def tell(self, *events: FlowEvent) -> Sequence[FlowAction]:
        fresh: list[FlowAction] = []
        for event in events:
            fresh += self.flow.handle(event)
            self.flow.check()
        self.actions += fresh
        if self.flow.phase is RequestPhase.DONE:
            self.check_the_end()
        return fresh

    def all(self, kind: type) -> list[Any]:
        return [action for action in self.actions if isinstance(action, kind)]

    @property
    def tokens(self) -> list[int]:
        return [token for emit in self.all(Emit) for token in emit.delta.token_ids]

    def check_the_end(self) -> None:
        assert len(self.all(FinishRequest)) == 1
        asked = [ask.attempt for ask in self.all(AskPlan)]
        ended = [end.attempt for end in self.all(EndPlan)]
        assert len(ended) == len(set(ended)) and set(ended) <= set(asked)
        shown = sum(end.output_tokens for end in self.all(EndPlan))
        assert shown == self.all(FinishRequest)[0].output_tokens, "plans add up to the output"
        leases = [release.handoff.lease_id for release in self.all(ReleaseHandoff)]
        assert len(leases) == len(set(leases)), "a hand-off is released once"


def kinds(actions: Sequence[FlowAction]) -> list[str]:
    return [type(action).__name__ for action in actions]
