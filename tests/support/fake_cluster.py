"""Workers and a scheduler made of timers, for the dispatcher. Holds no test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from engine.protocol import EngineRequest, Finish, FirstOutput
from front_proxy.dispatch.attempts import AttemptWords, Receiver
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.dispatch.scheduler_link import PlanReceiver
from front_proxy.request.bill import Part
from front_proxy.request.events import Measured, Outcome
from front_proxy.request.generation import GenerationDelta, GenerationRequest
from front_proxy.request.work import Stage, Submission, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure
from scheduler.api.actions import Placement
from scheduler.api.events import PlanRequested, RunningPlan
from tests.support.front_proxy_settings import configured
from tests.support.request_flow import handoff

P0 = Placement(worker_id="prefill-0", address="p0", epoch=1)
D0 = Placement(worker_id="decode-0", address="d0", epoch=2)
D1 = Placement(worker_id="decode-1", address="d1", epoch=3)

PLAN_S, PREFILL_S, PULL_S, STEP_S = 0.003, 0.020, 0.008, 0.005
TOKENS = 5
WHOLE_S = PLAN_S + PREFILL_S + PULL_S + TOKENS * STEP_S


class FakeCluster:
    """Stands for SchedulerLink and WorkerLinks at once; counts what is held."""

    def __init__(self) -> None:
        self.plans: set[int] = set()
        self.plans_granted = 0
        self.works: dict[int, Stage] = {}
        self.leases: set[str] = set()
        self.submissions: list[Submission] = []
        self.outcomes: list[Outcome] = []
        self.measured: list[Measured | None] = []
        self.fail: dict[Stage, Failure] = {}
        self.silent = False
        self.pulled: list[bool] = []
        self.suspects: list[str] = []
        self.questions: list[PlanRequested] = []
        # Steps after which the next decode says nothing more, and whether its worker still lives for others.
        self.freeze_after: int | None = None
        self.alive = False
        self.diverge = False
        # Whether requests that ask for a second plan wait for room, for ever.
        self.full = False

    @property
    def held(self) -> tuple[int, int, int]:
        return len(self.plans), len(self.works), len(self.leases)

    def new_plan_id(self) -> int:
        self.plans_granted += 1
        return self.plans_granted

    def plan(self, question: PlanRequested, receiver: PlanReceiver, part: Part | None = None) -> None:
        self.questions.append(question)
        plan_id = question.plan_id
        self.plans.add(plan_id)

        def answer() -> None:
            if plan_id in self.plans and not self.silent and not (self.full and question.resumed):
                prefill = None if question.pinned_decode_worker_id else P0
                if part is not None:
                    part.grant(part.most)
                decode = D1 if D0.worker_id in question.excluded_worker_ids else D0
                receiver(RunningPlan(plan_id=plan_id, request_id="r", prefill=prefill, decode=decode, decode_blocks=3))

        asyncio.get_running_loop().call_later(PLAN_S, answer)

    def end_plan(self, plan_id: int, outcome: Outcome, output_tokens: int, measured: Measured | None = None) -> None:
        self.plans.remove(plan_id)
        self.measured.append(measured)
        self.outcomes.append(outcome)

    def suspect(self, worker: Placement, reason: str) -> None:
        self.suspects.append(worker.worker_id)

    def heard_s(self, worker: Placement) -> float:
        return asyncio.get_running_loop().time() if self.alive else float("-inf")

    def submit(self, worker: Placement, submission: Submission, receiver: Receiver, on_work: object = None) -> int:
        self.submissions.append(submission)
        slot = len(self.submissions)
        self.works[slot] = submission.stage
        loop = asyncio.get_running_loop()
        if submission.stage in self.fail:
            loop.call_later(0.001, self._refuse, slot, receiver, self.fail.pop(submission.stage))
        elif submission.stage is Stage.PREFILL:
            loop.call_later(PREFILL_S, self._prefilled, slot, submission, receiver)
        else:
            loop.call_later(PULL_S + STEP_S, self._step, slot, submission, receiver, 0)
        return slot

    def abort(self, worker: Placement, slot: int) -> None:
        self.works.pop(slot, None)

    def release(self, handoff: KvHandoff, *, pulled: bool) -> bool:
        self.pulled.append(pulled)
        self.leases.remove(handoff.lease_id)
        return True

    def _refuse(self, slot: int, receiver: Receiver, failure: Failure) -> None:
        if self.works.pop(slot, None) is not None:
            receiver(failure)

    def _prefilled(self, slot: int, submission: Submission, receiver: Receiver) -> None:
        # An abort that comes while this is on its way is too late: the hand-off is delivered all the same.
        self.works.pop(slot, None)
        request_id = submission.engine_request.request_id
        self.leases.add(request_id)
        first = FirstOutput(cached_tokens=2, queue_s=0.004, compute_s=0.012)
        token = 100 + len(submission.engine_request.token_ids) - 3
        receiver(WorkerOutput(token_ids=[token], finish=Finish("length"), first=first, handoff=handoff(request_id)))

    def _step(self, slot: int, submission: Submission, receiver: Receiver, index: int) -> None:
        if slot not in self.works:
            return
        if index == self.freeze_after:
            self.freeze_after = None
            return
        position = len(submission.engine_request.token_ids) - 3 + index
        last = position == TOKENS - 1
        first, admission_s = (FirstOutput(external_tokens=3, queue_s=PULL_S), 0.001) if index == 0 else (None, 0.0)
        if last:
            del self.works[slot]
        else:
            asyncio.get_running_loop().call_later(STEP_S, self._step, slot, submission, receiver, index + 1)
        finish = Finish("stop") if last else None
        token = 100 + position + (50 if self.diverge else 0)
        if isinstance(receiver, AttemptWords) and not last and index:
            receiver.tokens([token])
        else:
            receiver(WorkerOutput(token_ids=[token], finish=finish, first=first, admission_s=admission_s))


class Behind:
    """A continuation that says how it was asked for."""

    def first(self, resume_tokens: int) -> bytes:
        return f"first behind {resume_tokens}".encode()

    def rest(self, resume_tokens: int) -> bytes:
        return f"rest behind {resume_tokens}".encode()


def generation(request_id: str = "r", **more: Any) -> GenerationRequest:
    fields: dict[str, Any] = {"continuation": Behind(), "output_tokens_max": TOKENS, **more}
    engine_request = EngineRequest(request_id=request_id, token_ids=[1, 2, 3], sampling=b"decode")
    return GenerationRequest(engine_request=engine_request, prefill_sampling=b"prefill", **fields)


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[Dispatcher, FakeCluster, CollectorRegistry]]:
    cluster, registry = FakeCluster(), CollectorRegistry()
    config, limits = configured(scheduler_address="nowhere:1", **settings)
    links: Any = cluster
    dispatcher = Dispatcher(config, limits=limits, metrics=DispatchMetrics(registry), planning=links, working=links)
    yield dispatcher, cluster, registry


async def collect(dispatcher: Dispatcher, request: GenerationRequest) -> list[GenerationDelta]:
    return [delta async for delta in dispatcher.generate(request)]


def tokens_of(deltas: list[GenerationDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
