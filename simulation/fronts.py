"""Front proxies in virtual time: production flows, their clients, and the streams between them and the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

import msgspec

from front_proxy.flow_events import (
    AbortWork,
    AskPlan,
    ClientGone,
    DeadlinePassed,
    Emit,
    EndPlan,
    Finish,
    FlowAction,
    FlowEvent,
    Output,
    Planned,
    PlanRefused,
    ReleaseHandoff,
    Retried,
    StartDecode,
    StartPrefill,
    WorkerFailed,
)
from front_proxy.request_flow import Phase, RequestFlow
from front_proxy.work import Placement, Stage, WorkerOutput
from kv_transfer.handoff import KvHandoff
from runtime.failures import Failure, FailureKind
from scheduler.events import PlanRequested
from simulation.faults import Faults
from simulation.workers import Link, OrderKey, order
from simulation.workload import Asked
from simulation.world import UP, Stream, Violation, World

if TYPE_CHECKING:
    from simulation.cluster import SimCluster

ATTEMPTS_MAX = 3
PLAN_TIMEOUT_S = 1.0
CONNECT_FAILURE_S = 0.01


class Client:
    """One request with its flow, and what its client saw."""

    def __init__(self, front: SimFront, asked: Asked, flow: type[RequestFlow]) -> None:
        self.asked = asked
        self.front = front
        self.flow = flow(
            attempts_max=ATTEMPTS_MAX,
            output_tokens_max=asked.output_tokens_max,
            seeded=asked.seeded,
            pinned_decode_worker="decode-0" if asked.pinned else None,
        )
        self.tokens = 0
        self.told_the_end = False
        self.finish: Finish | None = None
        self.plan_ids: dict[int, int] = {}
        self.plans_ended: set[int] = set()
        self.released: set[tuple[str, int, str]] = set()

    def arrive(self) -> None:
        """The request comes in."""
        world, asked = self.front.world, self.asked
        world.tell(asked.request_id, asked)
        world.after(asked.deadline_s, self.feed, DeadlinePassed())
        if asked.leaves_after_s is not None:
            world.after(asked.leaves_after_s, self.feed, ClientGone(satisfied=asked.satisfied))
        for action in self.flow.start():
            self._perform(action)

    def feed(self, event: FlowEvent, repeated: bool = False) -> None:
        """Something happened."""
        if not self.front.alive:
            return
        if repeated and self._is_live_decode(event):
            # Streams keep order and repeat nothing; what may come twice is everything that is decided on.
            return
        world = self.front.world
        if world.telling:
            world.tell(self.asked.request_id, f"{self.flow.phase.value}/{self.flow.attempt} <- {event}")
        actions = self.flow.handle(event)
        self.flow.check()
        for action in actions:
            if world.telling:
                world.tell(self.asked.request_id, f"    -> {action}")
            self._perform(action)
        if not repeated and world.rng.random() < self.front.faults.repeat:
            world.after(world.rng.uniform(0.0, 0.3), self.feed, event, True)

    def _is_live_decode(self, event: FlowEvent) -> bool:
        return (
            isinstance(event, Output)
            and event.stage is Stage.DECODE
            and event.attempt == self.flow.attempt
            and self.flow.phase is not Phase.DONE
        )

    def _perform(self, action: FlowAction) -> None:
        front, number = self.front, self.asked.number
        if self.finish is not None and not isinstance(action, ReleaseHandoff):
            raise Violation(f"{self.asked.request_id} goes on after its end: {action}")
        match action:
            case AskPlan(attempt=attempt):
                if attempt > ATTEMPTS_MAX:
                    raise Violation(f"{self.asked.request_id} tries a {attempt}th time")
                self.plan_ids[attempt] = front.ask(self, action)
            case StartPrefill(attempt=attempt, worker=worker):
                prompt = [0] * self.asked.prompt_tokens
                front.submit(self, worker, (number, attempt, Stage.PREFILL), prompt, None, 0)
            case StartDecode(attempt=attempt, worker=worker, handoff=handoff, shown=shown):
                tokens = [0] * self.asked.prompt_tokens + list(shown)
                front.submit(self, worker, (number, attempt, Stage.DECODE), tokens, handoff, action.blocks_reserved)
            case Emit():
                self._show(action)
            case AbortWork(attempt=attempt, stage=stage, worker=worker):
                front.abort(worker, (number, attempt, stage))
            case ReleaseHandoff(handoff=handoff, pulled=pulled):
                key = (handoff.worker_id, handoff.epoch, handoff.lease_id)
                if key in self.released:
                    raise Violation(f"{self.asked.request_id} releases {key} twice")
                self.released.add(key)
                front.release(handoff, pulled)
            case EndPlan(attempt=attempt):
                if attempt in self.plans_ended:
                    raise Violation(f"{self.asked.request_id} ends plan {attempt} twice")
                self.plans_ended.add(attempt)
                front.end_plan(self.plan_ids[attempt])
            case Retried():
                pass
            case Finish():
                self.finish = action
            case _:
                assert_never(action)

    def _show(self, emit: Emit) -> None:
        if self.told_the_end:
            raise Violation(f"{self.asked.request_id} shows {emit.delta} after its last delta")
        for token in emit.delta.token_ids:
            if token != self.asked.first_token + self.tokens:
                raise Violation(f"{self.asked.request_id} shows token {token} at position {self.tokens}")
            self.tokens += 1
        self.told_the_end = emit.delta.finish is not None


class _Pending(msgspec.Struct):
    client: Client
    ask: AskPlan


class SimFront:
    """One front proxy process."""

    def __init__(self, world: World, name: str, faults: Faults, cluster: SimCluster) -> None:
        self.world = world
        self.name = name
        self.faults = faults
        self.alive = True
        self.session = 0
        self.stream: Stream | None = None
        self.pending: dict[int, _Pending] = {}
        self.links: dict[tuple[str, int], Link] = {}
        self.live: dict[tuple[int, OrderKey], Client] = {}
        self._cluster = cluster
        self._next_plan_id = 1

    # The scheduler

    def connected(self, session: int, stream: Stream) -> None:
        """A stream to the scheduler is open: ask again what was not answered."""
        self.session, self.stream = session, stream
        for plan_id, pending in self.pending.items():
            self._send_question(plan_id, pending)

    def on_scheduler_lost(self) -> None:
        """The stream broke."""
        self.stream = None
        if self.alive:
            self.world.after(self.world.rng.uniform(0.01, 0.3), self._cluster.scheduler.connect, self)

    def ask(self, client: Client, ask: AskPlan) -> int:
        """Where should it run?"""
        plan_id = self._next_plan_id
        self._next_plan_id += 1
        pending = self.pending[plan_id] = _Pending(client, ask)
        self.world.after(PLAN_TIMEOUT_S, self._on_plan_timeout, plan_id)
        self._send_question(plan_id, pending)
        return plan_id

    def end_plan(self, plan_id: int) -> None:
        """Free what it reserved."""
        self.pending.pop(plan_id, None)
        self._send_end(plan_id)
        if self.world.rng.random() < self.faults.repeat:
            self._send_end(plan_id)

    def on_plan(
        self, plan_id: int, prefill: Placement | None, decode: Placement | None, blocks: int, reason: str
    ) -> None:
        """The scheduler placed it."""
        pending = self.pending.pop(plan_id, None)
        if pending is not None:
            pending.client.feed(
                Planned(
                    attempt=pending.ask.attempt,
                    prefill=prefill,
                    decode=decode,
                    decode_blocks_reserved=blocks,
                    reason=reason,
                )
            )

    def on_refused(self, plan_id: int, failure: Failure) -> None:
        """It runs nowhere."""
        pending = self.pending.pop(plan_id, None)
        if pending is not None:
            pending.client.feed(PlanRefused(attempt=pending.ask.attempt, failure=failure))

    def _on_plan_timeout(self, plan_id: int) -> None:
        if plan_id in self.pending and self.alive:
            self._send_end(plan_id)
            self.on_refused(plan_id, Failure(kind=FailureKind.UNAVAILABLE, message="no answer"))

    def _send_question(self, plan_id: int, pending: _Pending) -> None:
        if self.stream is None:
            return
        asked, ask = pending.client.asked, pending.ask
        event = PlanRequested(
            session=self.session,
            plan_id=plan_id,
            request_id=asked.request_id,
            prompt_tokens=asked.prompt_tokens,
            output_tokens_max=asked.output_tokens_max,
            excluded_worker_ids=frozenset(ask.excluded_worker_ids),
            pinned_decode_worker_id=ask.pinned_decode_worker,
            prefill_only=ask.prefill_only,
        )
        self.stream.send(UP, self._cluster.scheduler.on_plan, self, event)

    def _send_end(self, plan_id: int) -> None:
        if self.stream is not None:
            self.stream.send(UP, self._cluster.scheduler.on_ended, self.session, plan_id)

    # Workers

    def submit(
        self,
        client: Client,
        worker: Placement,
        key: OrderKey,
        tokens: list[int],
        handoff: KvHandoff | None,
        blocks: int,
    ) -> None:
        """Send an order, connecting first where there is no stream."""
        link = self.links.get((worker.worker_id, worker.epoch)) or self._cluster.open_link(self, worker)
        if link is None:
            failure = Failure(kind=FailureKind.UNAVAILABLE, message="cannot connect")
            event = WorkerFailed(attempt=key[1], stage=key[2], failure=failure)
            self.world.after(CONNECT_FAILURE_S, client.feed, event)
            return
        self.links[worker.worker_id, worker.epoch] = link
        self.live[link.number, key] = client
        request = order(key, client.asked, tokens, handoff, blocks)
        link.stream.send(UP, link.worker.on_submit, link, key, client.asked, request, client.tokens > 0)

    def abort(self, worker: Placement, key: OrderKey) -> None:
        """Take an order back."""
        link = self.links.get((worker.worker_id, worker.epoch))
        if link is not None:
            link.stream.send(UP, link.worker.on_abort, link, key)

    def release(self, handoff: KvHandoff, pulled: bool) -> None:
        """Let a hand-off go; where the stream is lost the worker did so by itself."""
        link = self.links.get((handoff.worker_id, handoff.epoch))
        if link is None:
            return
        message = (handoff.lease_id, handoff.epoch, pulled)
        link.stream.send(UP, link.worker.on_release, *message)
        if self.world.rng.random() < self.faults.repeat:
            link.stream.send(UP, link.worker.on_release, *message)

    def on_output(self, link: Link, key: OrderKey, output: WorkerOutput) -> None:
        """A worker produced something."""
        client = self.live.get((link.number, key))
        if output.finish is not None:
            self.live.pop((link.number, key), None)
        if client is not None:
            client.feed(Output(attempt=key[1], stage=key[2], output=output))

    def on_failure(self, link: Link, key: OrderKey, failure: Failure) -> None:
        """A worker's part is over."""
        client = self.live.pop((link.number, key), None)
        if client is not None:
            client.feed(WorkerFailed(attempt=key[1], stage=key[2], failure=failure))

    def on_link_lost(self, link: Link) -> None:
        """A stream to a worker broke."""
        if self.links.get((link.worker.worker_id, link.epoch)) is link:
            del self.links[link.worker.worker_id, link.epoch]
        if not self.alive:
            return
        if self.stream is not None:
            self.stream.send(UP, self._cluster.scheduler.on_suspect, link.worker.worker_id, link.epoch)
        for number, key in [at for at in self.live if at[0] == link.number]:
            self.on_failure(link, key, Failure(kind=FailureKind.UNAVAILABLE, message="stream lost"))
            assert (number, key) not in self.live

    def crash(self) -> None:
        """Lose everything at once; its clients see their connections break."""
        self.alive = False
        self.world.tell(self.name, "crashes")
        for link in list(self.links.values()):
            link.worker.cut(link)
        self.links.clear()
        self.live.clear()
        self.pending.clear()
        self._cluster.scheduler.disconnect(self)
