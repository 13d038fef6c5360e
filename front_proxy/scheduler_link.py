"""The front proxy's stream to the scheduler: pipelined plans, the cluster view, reconnecting. Never picks a worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from front_proxy import wire
from front_proxy.cluster_view import ClusterView
from front_proxy.duplex import Duplex
from front_proxy.flow_events import AskPlan, Outcome
from front_proxy.work import Placement
from protos.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.grpc_server import channel

logger = logging.getLogger(__name__)


class PlanReceiver(Protocol):
    """Gets the one answer to one question."""

    def on_plan(
        self, prefill: Placement | None, decode: Placement | None, decode_blocks_reserved: int, reason: str
    ) -> None:
        """The attempt may run there."""
        ...

    def on_refused(self, failure: Failure) -> None:
        """It may not run, or nobody answered in time; nothing is reserved."""
        ...


class PlanQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler is told about a request; never its tokens."""

    ask: AskPlan
    request_id: str
    prompt_tokens: int
    output_tokens_max: int
    priority: int


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the scheduler is reached."""

    address: str
    front_proxy_id: str
    pid: int
    plan_timeout_s: float
    connect_timeout_s: float
    backoff_min_s: float
    backoff_max_s: float
    send_messages_max: int
    message_bytes_max: int


class _Pending(msgspec.Struct):
    question: PlanQuestion
    receiver: PlanReceiver
    timer: asyncio.TimerHandle


_Item = scheduler_pb2.FrontUpdate


class SchedulerLink:
    """Questions asked while the scheduler is away wait for it, at most ``plan_timeout_s``."""

    def __init__(
        self,
        options: SchedulerOptions,
        view: ClusterView,
        *,
        on_view: Callable[[], None],
        on_gone: Callable[[str, int], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._options = options
        self._view = view
        self._on_view = on_view
        self._on_gone = on_gone
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._http_address = ""
        self._duplex: Duplex[_Item] | None = None
        self._opened = False
        self._pending: dict[int, _Pending] = {}
        self._next_plan_id = 1

    @property
    def connected(self) -> bool:
        """Whether the scheduler is on the line."""
        return self._opened

    def set_address(self, address: str) -> None:
        """Where users reach this front proxy, for ``baton status``; told at once and after every reconnect."""
        self._http_address = address
        self._send(self._register())

    def plan(self, question: PlanQuestion, receiver: PlanReceiver) -> int:
        """Ask; returns the plan's id, unique in this process. The answer comes later, through ``receiver``."""
        plan_id = self._next_plan_id
        self._next_plan_id += 1
        # First, so that a question that cannot be encoded is not asked anew after a reconnect.
        asked = _ask(plan_id, question)
        timer = self._loop.call_later(self._options.plan_timeout_s, self._on_timeout, plan_id)
        self._pending[plan_id] = _Pending(question, receiver, timer)
        self._send(asked)
        return plan_id

    def end_plan(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        """Free what a plan reserved. Of a question not answered yet, its answer too: the stream keeps their order."""
        pending = self._pending.pop(plan_id, None)
        if pending is not None:
            pending.timer.cancel()
        self._send(wire.request_ended(plan_id, outcome, output_tokens))

    def suspect(self, worker: Placement, reason: str) -> None:
        """Tell the scheduler that a worker could not be used."""
        self._send(wire.suspect(worker.worker_id, worker.epoch, reason))

    async def run(self) -> None:
        """Keep a stream to the scheduler until cancelled."""
        pause_s = self._options.backoff_min_s
        try:
            while True:
                opened, reason = await self._one_stream()
                if opened:
                    pause_s = self._options.backoff_min_s
                    self._on_lost(reason)
                logger.warning("no stream to the scheduler", extra={"reason": reason, "again_in_s": pause_s})
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, self._options.backoff_max_s)
        finally:
            self._refuse_all("The front proxy stops.")

    async def _one_stream(self) -> tuple[bool, str]:
        duplex: Duplex[_Item] = Duplex(
            encode=lambda item: item, on_message=self._on_message, send_messages_max=self._options.send_messages_max
        )
        self._duplex = duplex
        duplex.send(self._register())
        # A scheduler releases everything of a stream that ended, so what was asked on the last one is asked anew.
        for plan_id, pending in self._pending.items():
            duplex.send(_ask(plan_id, pending.question))
        opened = False
        async with channel(self._options.address, self._options.message_bytes_max) as connection:
            call = scheduler_pb2_grpc.SchedulerServiceStub(connection).FrontSession()
            try:
                reason = await duplex.run(call, connect_timeout_s=self._options.connect_timeout_s)
            finally:
                opened, self._opened = self._opened, False
                self._duplex = None
                self._view.disconnected()
        return opened, reason

    def _send(self, item: _Item) -> None:
        if self._duplex is not None:
            self._duplex.send(item)

    def _register(self) -> _Item:
        return scheduler_pb2.FrontUpdate(
            register=scheduler_pb2.FrontProxyInfo(
                front_proxy_id=self._options.front_proxy_id, address=self._http_address, pid=self._options.pid
            )
        )

    def _on_message(self, message: scheduler_pb2.FrontReply) -> None:
        self._opened = True
        if message.HasField("plan"):
            plan = message.plan
            if (pending := self._answered(plan.plan_id)) is not None:
                pending.receiver.on_plan(
                    wire.placement(plan.prefill) if plan.HasField("prefill") else None,
                    wire.placement(plan.decode) if plan.HasField("decode") else None,
                    plan.decode_blocks_reserved,
                    plan.reason,
                )
        elif message.HasField("refused"):
            refused = message.refused
            if (pending := self._answered(refused.plan_id)) is not None:
                pending.receiver.on_refused(wire.failure(refused.kind, refused.message, refused.retry_after_ms))
        elif message.HasField("view"):
            for worker_id, epoch in self._view.apply(wire.cluster(message.view)):
                self._on_gone(worker_id, epoch)
            self._on_view()

    def _answered(self, plan_id: int) -> _Pending | None:
        """The question behind an answer; None when nobody waits for it, whose end was sent already."""
        pending = self._pending.pop(plan_id, None)
        if pending is not None:
            pending.timer.cancel()
        return pending

    def _on_timeout(self, plan_id: int) -> None:
        pending = self._pending.pop(plan_id)
        # Behind the question on the same stream: should the answer still come, its reservation is freed.
        self._send(wire.request_ended(plan_id, "failed", 0))
        away = "" if self._opened else " It is not reachable."
        pending.receiver.on_refused(
            Failure(
                kind=FailureKind.UNAVAILABLE,
                message=f"The scheduler did not answer within {self._options.plan_timeout_s:g} s.{away}",
            )
        )

    def _refuse_all(self, message: str) -> None:
        waiting, self._pending = self._pending, {}
        for pending in waiting.values():
            pending.timer.cancel()
            pending.receiver.on_refused(Failure(kind=FailureKind.UNAVAILABLE, message=message))


def _ask(plan_id: int, question: PlanQuestion) -> _Item:
    return wire.plan_request(
        plan_id,
        question.ask,
        request_id=question.request_id,
        prompt_tokens=question.prompt_tokens,
        output_tokens_max=question.output_tokens_max,
        priority=question.priority,
    )
