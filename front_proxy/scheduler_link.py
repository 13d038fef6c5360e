"""The front proxy's stream to the scheduler: pipelined plans, the cluster view, reconnecting.

It picks no worker while the scheduler answers. While it is away, silent, or only coming back to itself after a restart,
requests are planned by ``outage_planner`` from the last cluster view, and the scheduler is told once it is well.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

import msgspec

from front_proxy import wire
from front_proxy.cluster_view import ClusterView
from front_proxy.degraded_plans import DegradedPlans
from front_proxy.duplex import Duplex
from front_proxy.flow_events import AskPlan, Outcome
from front_proxy.leader_watch import LeaderWatch
from front_proxy.outage_planner import SESSION
from front_proxy.work import Placement
from protos.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from runtime.addresses import Addresses
from runtime.failures import Failure, FailureKind
from runtime.grpc_server import channel
from scheduler import wire as scheduler_wire
from scheduler.actions import Placement as CorePlacement
from scheduler.config import SchedulerConfig
from scheduler.events import RunningPlan

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
    priority_class: str = ""
    tenant: str = ""
    wait_max_s: float = 0.0
    """Longest wait for a place; 0: the scheduler's own bound."""


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the scheduler is reached."""

    address: str
    """host:port, or several with commas between them: one of them leads."""
    front_proxy_id: str
    plan_timeout_s: float
    plan_patience_s: float
    plans_told_interval_s: float
    view_max_age_s: float
    load_fade_s: float
    connect_timeout_s: float
    silence_timeout_s: float
    """Of several schedulers, one that stays silent for so long is left for the next."""
    backoff_min_s: float
    backoff_max_s: float
    send_messages_max: int
    message_bytes_max: int


class _Pending(msgspec.Struct):
    question: PlanQuestion
    receiver: PlanReceiver
    timer: asyncio.Handle


_Item = scheduler_pb2.FrontUpdate


class SchedulerLink:
    """Questions that nobody can answer now wait for the scheduler, at most ``plan_timeout_s``."""

    def __init__(
        self,
        options: SchedulerOptions,
        view: ClusterView,
        *,
        on_view: Callable[[], None],
        on_gone: Callable[[str, int], None],
        on_lost: Callable[[str], None],
        on_degraded: Callable[[str], None],
        policy: SchedulerConfig,
    ) -> None:
        self._options = options
        self._view = view
        self._on_view = on_view
        self._on_gone = on_gone
        self._on_lost = on_lost
        self._degraded = DegradedPlans(
            policy,
            view_max_age_s=options.view_max_age_s,
            load_fade_s=options.load_fade_s,
            on_plan=on_degraded,
        )
        self._loop = asyncio.get_running_loop()
        self._addresses = Addresses(options.address)
        self._leader = LeaderWatch(silence_timeout_s=options.silence_timeout_s, several=len(self._addresses) > 1)
        self._duplex: Duplex[_Item] | None = None
        self._opened = False
        self._silent = False
        self._pending: dict[int, _Pending] = {}
        self._next_plan_id = 1
        self._telling: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        """Whether the scheduler is on the line and answers."""
        return self._opened and not self._silent

    @property
    def degraded(self) -> bool:
        """Whether requests are planned here."""
        return self._degraded.active

    def plan(self, question: PlanQuestion, receiver: PlanReceiver) -> int:
        """Ask; returns the plan's id, unique in this process. The answer comes later, through ``receiver``."""
        plan_id = self._next_plan_id
        self._next_plan_id += 1
        # First, so that a question that cannot be encoded is not asked anew after a reconnect.
        asked = _ask(plan_id, question)
        timer: asyncio.Handle
        if not self._answers and self._can_plan():
            timer = self._loop.call_soon(self._plan_here, plan_id)
        else:
            self._send(asked)
            wait_s = min(self._options.plan_patience_s, self._options.plan_timeout_s)
            timer = self._loop.call_later(wait_s, self._on_impatience, plan_id)
        self._pending[plan_id] = _Pending(question, receiver, timer)
        return plan_id

    def end_plan(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        """Free what a plan reserved. Of a question not answered yet, its answer too: the stream keeps their order."""
        pending = self._pending.pop(plan_id, None)
        if pending is not None:
            pending.timer.cancel()
        self._degraded.ended(plan_id, output_tokens, self._loop.time())
        self._send(wire.request_ended(plan_id, outcome, output_tokens))

    def suspect(self, worker: Placement, reason: str) -> None:
        """Tell the scheduler that a worker could not be used."""
        self._degraded.suspect(worker.worker_id, worker.epoch, reason, self._loop.time())
        self._send(wire.suspect(worker.worker_id, worker.epoch, reason))

    async def run(self) -> None:
        """Keep a stream to the scheduler until cancelled."""
        pause_s = self._options.backoff_min_s
        try:
            while True:
                opened, ended, reason = await self._one_stream()
                if opened:
                    pause_s = self._options.backoff_min_s
                    self._addresses.served()
                    self._on_lost(reason)
                pause = self._addresses.failed(silent=ended.silent, instead=ended.serves_instead)
                # Many front proxies lose one scheduler at one moment; they must not all return at one moment.
                wait_s = pause_s * random.uniform(0.5, 1.0) if pause else 0.0
                logger.warning("no stream to the scheduler", extra={"reason": reason, "again_in_s": round(wait_s, 3)})
                if pause:
                    await asyncio.sleep(wait_s)
                    pause_s = min(pause_s * 2, self._options.backoff_max_s)
        finally:
            self._refuse_all("The front proxy stops.")

    async def _one_stream(self) -> tuple[bool, Duplex[_Item], str]:
        """Whether the scheduler ever spoke, the stream that has ended, and why it has."""
        duplex: Duplex[_Item] = Duplex(
            encode=lambda item: item, on_message=self._on_message, send_messages_max=self._options.send_messages_max
        )
        self._duplex, self._silent = duplex, False
        self._leader.begin(duplex)
        # Nothing behind it until it is answered: a write that meets a refusal would hide what the refusal says.
        duplex.send(self._register())
        opened = False
        async with channel(self._addresses.current, self._options.message_bytes_max) as connection:
            call = scheduler_pb2_grpc.SchedulerServiceStub(connection).FrontSession()
            self._tell_later()
            try:
                reason = await duplex.run(call, connect_timeout_s=self._options.connect_timeout_s)
            finally:
                self._leader.end()
                if self._telling is not None:
                    self._telling.cancel()
                if self._answers:
                    self._degraded.still_true(self._loop.time())
                opened, self._opened = self._opened, False
                self._duplex = None
                self._view.disconnected()
                self._plan_pending_here()
        return opened, duplex, reason

    def _send(self, item: _Item) -> None:
        # A silent scheduler is told everything at once when it speaks; until then nothing piles up.
        if self._duplex is not None and self._opened and not self._silent:
            self._duplex.send(item)

    def _tell_all(self) -> None:
        """A scheduler releases everything of a stream that ended: say what runs, and ask anew what was asked."""
        self._send(self._plans_running())
        for plan_id, pending in self._pending.items():
            self._send(_ask(plan_id, pending.question))

    def _register(self) -> _Item:
        return scheduler_pb2.FrontUpdate(
            register=scheduler_pb2.FrontProxyInfo(front_proxy_id=self._options.front_proxy_id)
        )

    def _plans_running(self) -> _Item:
        return wire.plans_running(self._degraded.running.values(), asked=self._pending, complete=True)

    def _tell_later(self) -> None:
        self._telling = self._loop.call_later(self._options.plans_told_interval_s, self._tell)

    def _tell(self) -> None:
        """Say from time to time what runs: an end that got lost must not reserve for ever."""
        self._send(self._plans_running())
        self._tell_later()

    def _on_message(self, message: scheduler_pb2.FrontReply) -> None:
        if not self._leader.believes(message):
            return
        if not self._opened:
            self._opened = True
            self._tell_all()
        if self._silent:
            self._silent = False
            self._send(self._plans_running())
        if message.HasField("plan"):
            plan = message.plan
            if (pending := self._answered(plan.plan_id)) is not None:
                request_id = pending.question.request_id
                self._granted(scheduler_wire.granted(request_id, plan), pending, plan.reason)
        elif message.HasField("refused"):
            refused = message.refused
            if (pending := self._answered(refused.plan_id)) is not None:
                pending.receiver.on_refused(wire.failure(refused.kind, refused.message, refused.retry_after_ms))
        elif message.HasField("waiting"):
            self._on_waiting(message.waiting)
        elif message.HasField("view"):
            self._on_new_view(message.view)
        if self._answers:
            self._degraded.resume()

    def _on_waiting(self, waiting: scheduler_pb2.PlanWaiting) -> None:
        """The request waits for its turn: the scheduler answers within that time, or it is not well."""
        pending = self._pending.get(waiting.plan_id)
        if pending is not None:
            pending.timer.cancel()
            wait_s = waiting.wait_max_ms / 1000 + self._options.plan_patience_s
            pending.timer = self._loop.call_later(wait_s, self._on_impatience, waiting.plan_id)

    def _on_new_view(self, view: scheduler_pb2.ClusterView) -> None:
        self._degraded.see(view, self._loop.time())
        for worker_id, epoch in self._view.apply(wire.cluster(view), rebuilding=view.rebuilding):
            self._on_gone(worker_id, epoch)
        self._on_view()

    def _granted(self, plan: RunningPlan, pending: _Pending, reason: str) -> None:
        self._degraded.running[plan.plan_id] = plan
        pending.receiver.on_plan(_placement(plan.prefill), _placement(plan.decode), plan.decode_blocks, reason)

    def _answered(self, plan_id: int) -> _Pending | None:
        """The question behind an answer; None when nobody waits for it, whose end was sent already."""
        pending = self._pending.pop(plan_id, None)
        if pending is not None:
            pending.timer.cancel()
        return pending

    @property
    def _answers(self) -> bool:
        """Whether the scheduler is asked. One that is rebuilding may know less than we do."""
        return self._opened and not self._silent and not self._degraded.knows_more

    def _can_plan(self) -> bool:
        """Whether the last view is good enough to plan from."""
        return self._degraded.fresh(self._loop.time()) and self._view.snapshot.usable

    def _plan_pending_here(self) -> None:
        """The stream is lost: whoever waits for an answer on it need not wait for the next one."""
        if self._can_plan():
            for plan_id in list(self._pending):
                self._plan_here(plan_id)

    def _plan_here(self, plan_id: int) -> None:
        pending = self._answered(plan_id)
        assert pending is not None, plan_id
        why = "away" if not self._opened else "silent" if self._silent else "rebuilding"
        question = scheduler_wire.plan_requested(SESSION, _ask(plan_id, pending.question).plan, block_hashes_max=0)
        plan = self._degraded.plan(question, why, self._loop.time())
        if isinstance(plan, Failure):
            pending.receiver.on_refused(plan)
        else:
            self._granted(plan, pending, "degraded")
            self._send(wire.plans_running([plan], asked=(), complete=False))

    def _on_impatience(self, plan_id: int) -> None:
        """Nothing came within ``plan_patience_s``: plan here, or give the scheduler the rest of ``plan_timeout_s``."""
        if self._can_plan():
            # Behind the question on the same stream: should the answer still come, its reservation is freed.
            self._send(wire.request_ended(plan_id, "failed", 0))
            if self._answers:
                self._degraded.still_true(self._loop.time())
            self._silent = self._opened
            self._plan_here(plan_id)
            return
        rest_s = max(0.0, self._options.plan_timeout_s - self._options.plan_patience_s)
        self._pending[plan_id].timer = self._loop.call_later(rest_s, self._on_timeout, plan_id)

    def _on_timeout(self, plan_id: int) -> None:
        pending = self._pending.pop(plan_id)
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


def _placement(placed: CorePlacement | None) -> Placement | None:
    if placed is None:
        return None
    return Placement(worker_id=placed.worker_id, address=placed.address, epoch=placed.epoch)


def _ask(plan_id: int, question: PlanQuestion) -> _Item:
    return wire.plan_request(
        plan_id,
        question.ask,
        request_id=question.request_id,
        prompt_tokens=question.prompt_tokens,
        output_tokens_max=question.output_tokens_max,
        priority=question.priority,
        priority_class=question.priority_class,
        tenant=question.tenant,
        wait_max_s=question.wait_max_s,
    )
