"""Clients in virtual time. Each makes one request, and records what it saw and what the request's flow did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from engine.fake.model import FakeSampling, sequence_state
from engine.protocol import EngineRequest
from front_proxy.dispatch.request_driver import RequestDriver
from front_proxy.request.bill import Bill
from front_proxy.request.events import (
    Diverged,
    EndPlan,
    FinishRequest,
    FlowAction,
    FlowEvent,
    Output,
    ReleaseHandoff,
    RequestPhase,
    Retried,
    Stalled,
)
from front_proxy.request.generation import GenerationDelta, GenerationRequest
from front_proxy.request.prompt_keys import PromptKeys
from front_proxy.request.work import Stage
from runtime.failures import Failure, FailureError
from simulation.faults import checkers
from simulation.faults.invariants import Invariant, hold
from simulation.faults.workload import Asked

if TYPE_CHECKING:
    from simulation.faults.processes import FrontProcess

FIRST_PROMPT_TOKEN = 3
VOCABULARY = 5_000
# What budgets and rates say.
REFUSED = ("insufficient_quota", "rate_limit_exceeded")


class Continues:
    """How the fake engine goes on behind tokens that were shown."""

    def __init__(self, asked: Asked, sampling: dict[str, Any]) -> None:
        self._asked = asked
        self._sampling = sampling

    def first(self, _shown_tokens: int) -> bytes:
        """One token more."""
        return msgspec.msgpack.encode({**self._sampling, "max_tokens": 1})

    def rest(self, shown_tokens: int) -> bytes:
        """All that is left."""
        left = self._asked.output_tokens_max - shown_tokens
        return msgspec.msgpack.encode({**self._sampling, "max_tokens": left})


class Client:
    """One request. ``outcome`` is "" until it has its end or has lost its front proxy."""

    def __init__(self, front: FrontProcess, asked: Asked) -> None:
        self.front = front
        self.asked = asked
        self.on_over: Callable[[Client], None] = lambda _client: None
        """Told when it has its end, or has lost its front proxy."""
        self.run: RequestDriver | None = None
        self.bill: Bill | None = None
        self.right: list[int] = []
        self.tokens = self.tokens_charged = self.attempts = 0
        self.outcome = ""
        self.over_s = 0.0
        self.told_the_end = False
        self.failure: Failure | None = None
        self.finish: FinishRequest | None = None
        self.diverged = False
        self.gap_s = 0.0
        self._retries = self._retries_in_a_row = self._delivered = 0
        # Delivered tokens computed again: by this attempt, and by the furthest one since the last new token.
        self._replayed = self._furthest = 0
        self._repeating = False
        self._shown_s = 0.0
        self._loop = front.loop
        self._released: set[tuple[str, int, str]] = set()
        self._plans_ended: set[int] = set()

    @property
    def cut_by_budget(self) -> bool:
        """Its output ended before its time because no more was granted."""
        return self.bill is not None and "budget" in self.bill.ended

    def arrive(self) -> None:
        """The request comes in. Call within its front proxy's loop."""
        front, asked = self.front, self.asked
        front.world.log(asked.request_id, asked)
        front.clients[self] = None
        front.requests += 1
        self._shown_s = front.world.now_s
        task = self._loop.create_task(self._read())
        if asked.leaves_after_s is not None:
            self._loop.call_later(asked.leaves_after_s, self._leave, task)

    def lost_its_front(self) -> None:
        """Its connection broke."""
        self.outcome, self.over_s = "front_died", self.front.world.now_s
        self.on_over(self)

    def _request(self) -> GenerationRequest:
        asked = self.asked
        prompt = [FIRST_PROMPT_TOKEN + asked.number % (VOCABULARY - FIRST_PROMPT_TOKEN)] * asked.prompt_tokens
        self.right, stops = right_answer(prompt, asked)
        plain: dict[str, Any] = {"temperature": 0.0}
        sampling = {**plain, "stop_token_ids": stops}
        known = asked.continuing or asked.output_tokens_max == 1
        if self.front.bills is not None:
            key = self.front.cluster.accounts.key_of(asked)
            self.bill = self.front.bills.new(key.key_id, key.team, "simulated")
            self.bill.priority_class = self.front.cluster.accounts.class_of(asked)
        return GenerationRequest(
            engine_request=EngineRequest(
                request_id=asked.request_id,
                token_ids=prompt,
                sampling=msgspec.msgpack.encode({**sampling, "max_tokens": asked.output_tokens_max}),
            ),
            prefill_sampling=msgspec.msgpack.encode({**(sampling if known else plain), "max_tokens": 1}),
            continuation=Continues(asked, sampling) if asked.continuing else None,
            output_tokens_max=asked.output_tokens_max,
            prompt_keys=PromptKeys(prompt),
            deadline_s=asked.deadline_s,
            account=None if self.bill is None else self.bill.part(len(prompt)),
            pinned_decode_worker="decode-0" if asked.pinned else None,
        )

    def _leave(self, task: asyncio.Task[None]) -> None:
        if not self.outcome:
            if self.asked.satisfied:
                self.front.dispatcher.satisfied(self.asked.request_id)
            task.cancel()

    async def _read(self) -> None:
        try:
            self.run = self.front.dispatcher.generate(self._request())
            self._watch(self.run)
            async for delta in self.run:
                self._show(delta)
            self.outcome = "finished"
        except FailureError as error:
            self.failure = error.failure
            self.outcome = "refused" if self.failure.code in REFUSED else "failed"
        except asyncio.CancelledError:
            self.outcome = "finished" if self.asked.satisfied else "cancelled"
        except (AssertionError, LookupError) as error:
            self.front.world.broken = error
            raise
        self.over_s = self.front.world.now_s
        if self.bill is not None and self.front.bills is not None:
            if self.tokens:
                self.bill.begin(self.asked.prompt_tokens, 0)
            self.bill.output_tokens = self.tokens
            failed = self.failure is not None
            self.front.bills.close(self.bill, answered=self.tokens > 0, failed=failed, ttft_s=0.0)
        self.front.clients.pop(self, None)
        if self.front.world.logs_events:
            self.front.world.log(self.asked.request_id, f"{self.outcome}, {self.tokens} tokens, {self.failure}")
        self.on_over(self)

    def _show(self, delta: GenerationDelta) -> None:
        now_s = self.front.world.now_s
        self.gap_s = max(self.gap_s, now_s - max(self._shown_s, self.front.excused_s))
        self._shown_s = now_s
        request_id = self.asked.request_id
        hold(Invariant.TOKENS, not self.told_the_end, f"{request_id} shows more after its last delta", delta)
        right = self.right[self.tokens : self.tokens + len(delta.token_ids)] == list(delta.token_ids)
        hold(Invariant.TOKENS, right, f"{request_id} shows wrong tokens behind its first {self.tokens}", delta)
        if delta.token_ids:
            self.tokens += len(delta.token_ids)
            self._furthest = 0
        self.told_the_end = delta.finish is not None

    # Its flow

    def _watch(self, run: RequestDriver) -> None:
        """Look at everything that its flow is told and does."""
        world = self.front.world
        flow: Any = run.flow
        handle: Callable[[FlowEvent], Sequence[FlowAction]] = flow.handle

        def watched(event: FlowEvent) -> Sequence[FlowAction]:
            self._before(event)
            if world.logs_events:
                world.log(self.asked.request_id, f"{flow.phase.value}/{flow.attempt} <- {event}")
            actions = handle(event)
            flow.check()
            for action in actions:
                if world.logs_events:
                    world.log(self.asked.request_id, f"    -> {action}")
                self._after(action)
            return actions

        flow.handle = world.watched(watched)

    def _before(self, event: FlowEvent) -> None:
        run, rng = self.run, self.front.world.rng
        assert run is not None
        flow = run.flow
        self.attempts = flow.attempt
        decodes = isinstance(event, Output) and event.stage is Stage.DECODE and event.attempt == flow.attempt
        if isinstance(event, Output) and decodes and flow.phase is not RequestPhase.DONE:
            self._count_replayed(len(event.output.token_ids))
        elif not self._repeating and rng.random() < self.front.cluster.faults.repeat:
            # The outputs of a decode come once and in order. Any other event may come twice.
            self._loop.call_later(rng.uniform(0.0, 0.3), self._repeat, event)
        if isinstance(event, Stalled) and not self._repeating and flow.awaited is not None:
            checkers.check_blame(self, flow.awaited, event.waited_s)

    def _repeat(self, event: FlowEvent) -> None:
        assert self.run is not None
        flow = self.run.flow
        if not isinstance(event, Output) or event.stage is not Stage.DECODE or event.attempt != flow.attempt:
            self._repeating = True
            self.run.feed(event)
            self._repeating = False

    def _after(self, action: FlowAction) -> None:
        request_id = self.asked.request_id
        goes_on = self.finish is not None and not isinstance(action, ReleaseHandoff)
        hold(Invariant.ENDS_ONCE, not goes_on, f"{request_id} goes on after its end", action)
        match action:
            case ReleaseHandoff(handoff=handoff):
                key = (handoff.worker_id, handoff.epoch, handoff.lease_id)
                hold(Invariant.RETURNED, key not in self._released, f"{request_id} releases twice", key)
                self._released.add(key)
            case EndPlan(attempt=attempt, output_tokens=output_tokens):
                hold(Invariant.RETURNED, attempt not in self._plans_ended, f"{request_id} ends a plan twice", attempt)
                self._plans_ended.add(attempt)
                self.tokens_charged += output_tokens
            case Retried(counted=counted):
                self._replayed = 0
                if counted:
                    self._count_retry()
            case Diverged():
                self.diverged = True
            case FinishRequest():
                self.finish = action
            case _:
                pass

    def _count_replayed(self, tokens: int) -> None:
        """If a replay gets further than those before it, the retries in a row count from 0 again."""
        self._replayed += tokens
        if not self.asked.continuing and self._furthest < self._replayed <= self.tokens:
            self._furthest = self._replayed
            self._retries_in_a_row = 0

    def _count_retry(self) -> None:
        assert self.run is not None
        # New tokens begin the count anew, also those that this client has not read yet.
        if self.run.flow.output_tokens > self._delivered:
            self._delivered, self._retries_in_a_row = self.run.flow.output_tokens, 0
        self._retries += 1
        self._retries_in_a_row += 1
        self.front.retries += 1
        attempts_max, request_id = self.front.config.attempts_max, self.asked.request_id
        in_a_row, retries = self._retries_in_a_row, self._retries
        hold(Invariant.RETRIES, in_a_row < attempts_max, f"{request_id} is tried too often in a row", in_a_row)
        often = retries >= attempts_max * (self.front.limits.resumes_max + 1)
        hold(Invariant.RETRIES, not often, f"{request_id} is tried too often", retries)


def right_answer(prompt: list[int], asked: Asked) -> tuple[list[int], list[int]]:
    """What an engine that is never disturbed gives, and the tokens at which it stops."""
    state = sequence_state(prompt, FakeSampling(temperature=0.0), 0)
    tokens: list[int] = []
    for _ in range(asked.output_tokens_max):
        token = state.next_token(VOCABULARY)
        state.append(token)
        first_time = token not in tokens
        tokens.append(token)
        if first_time and len(tokens) >= asked.natural_tokens:
            return tokens, [token]
    return tokens, []
