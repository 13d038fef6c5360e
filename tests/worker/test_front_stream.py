"""One front proxy's requests over an engine that does what the test says: each ends once, and nothing is held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from engine.protocol import (
    Engine,
    EngineDead,
    EngineLoad,
    EngineOutput,
    EngineRequest,
    Finish,
    InvalidRequest,
    OnOutput,
)
from prefill_worker.config import PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import FailureKind
from tests.support import workers
from tests.support.in_process_worker import submit
from tests.support.polling import until
from worker.config import WorkerConfig, WorkerLimits
from worker.core import WorkerCore
from worker.front_stream import FrontStream
from worker.lifecycle import Event
from worker.metrics import WorkerMetrics

PROMPT = [1] * 20


class Puppet:
    """An engine that runs requests until it is told their end, and remembers what it was asked."""

    def __init__(self) -> None:
        self.info = workers.INFO
        self.outputs: dict[str, OnOutput] = {}
        self.ends: dict[str, asyncio.Future[None]] = {}
        self.cleaned = asyncio.Event()
        self.cleaned.set()
        self.cancelled: list[str] = []
        self.released: list[str] = []
        self.was_pulled: list[str] = []
        self.kv_blocks_used = 0
        self.hangs = False
        self.dead = False

    async def generate(self, request: EngineRequest, on_output: OnOutput) -> None:
        name = request.request_id
        self.outputs[name], self.ends[name] = on_output, asyncio.get_running_loop().create_future()
        try:
            await self.ends[name]
        except asyncio.CancelledError:
            self.cancelled.append(name)
            await self.cleaned.wait()
            raise

    async def release(self, handoff_lease_id: str) -> None:
        if self.dead:
            raise EngineDead
        if self.hangs:
            await asyncio.Event().wait()
        self.released.append(handoff_lease_id)

    def pulled(self, handoff_lease_id: str) -> None:
        self.was_pulled.append(handoff_lease_id)

    def load(self) -> EngineLoad:
        return EngineLoad(kv_blocks_used=self.kv_blocks_used)

    def report_blocks(self, listener: object, rank: int = 0) -> bool:
        return False

    def hand_over(self, name: str) -> None:
        """The prefill of ``name`` is done; its KV is held."""
        handoff = workers.handoff(lease_id=name, tokens=20, blocks=2, lease_remaining_s=60.0)
        self.outputs[name](EngineOutput(token_ids=[5], finish=Finish("length"), handoff=handoff))

    def end(self, name: str) -> None:
        self.hand_over(name)
        self.ends[name].set_result(None)


class Stage:
    def __init__(self, **limits: Any) -> None:
        self.engine = Puppet()
        role = PrefillRole(PrefillWorkerConfig(lease_s=30.0), workers.INFO, "prefill-0")
        self.registry = CollectorRegistry()
        self.core = WorkerCore(
            engine=cast(Engine, self.engine),
            role=role,
            config=WorkerConfig(),
            limits=WorkerLimits(**limits),
            worker_id="prefill-0",
            metrics=WorkerMetrics("prefill", self.registry),
        )
        self.core.happen(Event.STARTED)
        self.front = FrontStream(self.core, "front-0")

    async def submit(self, name: str, slot: int = 1, **fields: Any) -> None:
        self.front.submit(submit(slot, PROMPT, prefill=True, request_id=name, **fields).submit)
        await asyncio.sleep(0)

    async def said(self) -> list[pb.Delta]:
        step = await asyncio.wait_for(self.front.batcher.next_step(), 10.0)
        assert step is not None
        return list(step.deltas)

    def release(self, name: str, *, pulled: bool = False) -> None:
        self.core.release(pb.ReleaseHandoff(lease_id=name, epoch=workers.EPOCH, pulled=pulled))

    async def settled(self) -> None:
        assert await self.core.background.wait(10.0) == 0
        assert self.core.idle and self.core.prefill_tokens_queued == 0


@asynccontextmanager
async def playing(**limits: Any) -> AsyncIterator[Stage]:
    made = Stage(**limits)
    try:
        yield made
    finally:
        made.engine.cleaned.set()
        await made.front.close()
        await made.core.background.wait(1.0)


async def test_the_engine_hears_once_that_its_kv_was_pulled_and_not_that_it_was_released() -> None:
    async with playing() as made:
        for name, pulled in (("a", True), ("b", False)):
            await made.submit(name)
            made.engine.end(name)
            for _ in range(2):
                made.release(name, pulled=pulled)
        await made.settled()
        assert (made.engine.was_pulled, made.engine.released) == (["a"], ["b"])


async def test_an_engines_clean_up_is_never_cut_short_by_a_second_reason() -> None:
    async with playing(abort_timeout_s=0.01) as made:
        made.engine.cleaned.clear()
        await made.submit("a", deadline_ms=60_000)
        for _ in range(3):
            made.front.abort(1)
            await asyncio.sleep(0)
        await made.front.close()
        assert made.core.admission.requests == 1
        made.engine.cleaned.set()
        await until(lambda: made.core.admission.requests == 0, within_s=10.0)
        assert made.engine.cancelled == ["a"]


async def test_a_request_that_is_over_leaves_no_task_and_no_timer_on_a_stream_that_goes_on() -> None:
    async with playing() as made:
        await made.submit("a", deadline_ms=60_000)
        live = made.front._live[1]
        assert live.deadline is not None
        made.engine.end("a")
        await until(lambda: made.core.admission.requests == 0, within_s=10.0)
        assert live.deadline.cancelled() and not made.front._tasks and not made.front._live
        told = made.registry.get_sample_value
        assert told("baton_worker_lease_events_total", {"event": "offered"}) == 1.0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("no such token"), FailureKind.BAD_REQUEST),
        (EngineDead("it died"), FailureKind.UNAVAILABLE),
        (RuntimeError("a bug"), FailureKind.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_an_engine_says_is_told_by_its_kind(error: Exception, kind: FailureKind) -> None:
    async with playing() as made:
        await made.submit("a")
        made.engine.ends["a"].set_exception(error)
        (delta,) = await made.said()
        assert delta.failure.kind == kind
        assert made.core.engine_lost.is_set() == isinstance(error, EngineDead)
        await made.settled()


async def test_behind_words_that_were_lost_nothing_is_said_on_a_stream_any_more() -> None:
    async with playing(waiting_deltas_max=1) as made:
        for slot, name in ((1, "a"), (2, "b")):
            await made.submit(name, slot)
        for name in ("a", "b", "a"):
            made.engine.outputs[name](EngineOutput(token_ids=[5]))
        assert made.front.failure and made.front.failure.kind is FailureKind.EXHAUSTED
        assert await asyncio.wait_for(made.front.batcher.next_step(), 10.0) is None


async def test_a_prompt_is_queued_until_its_first_output_and_counted_once() -> None:
    async with playing() as made:
        await made.submit("a", 1)
        await made.submit("b", 2)
        assert made.core.prefill_tokens_queued == 40
        made.engine.end("a")
        await until(lambda: made.core.admission.requests == 1, within_s=10.0)
        assert made.core.prefill_tokens_queued == 20
        made.front.abort(2)
        await until(lambda: made.core.admission.requests == 0, within_s=10.0)
        assert made.core.prefill_tokens_queued == 0
        made.release("a")
        await made.settled()


async def test_a_request_is_admitted_against_leases_and_against_what_the_engine_uses() -> None:
    async with playing() as made:
        await made.submit("held", 1)
        made.engine.end("held")
        made.engine.kv_blocks_used = made.core.role.blocks_limit - 1
        await made.submit("more", 2)
        (_, refused) = await made.said()
        assert refused.failure.kind == FailureKind.EXHAUSTED
        made.engine.kv_blocks_used = 0
        await made.submit("more", 2)
        assert made.core.admission.requests == 1


async def test_two_requests_of_one_name_never_run_at_once_and_none_has_no_name() -> None:
    async with playing() as made:
        await made.submit("a", 1)
        await made.submit("a", 2)
        await made.submit("", 3)
        refused = await made.said()
        assert [(delta.slot, delta.failure.kind) for delta in refused] == [
            (2, FailureKind.BAD_REQUEST),
            (3, FailureKind.BAD_REQUEST),
        ]
        assert made.core.admission.requests == 1


async def test_a_drain_waits_for_requests_and_for_leases() -> None:
    async with playing() as made:
        await made.submit("a")
        made.core.happen(Event.DRAIN_ASKED)
        made.engine.end("a")
        await until(lambda: made.core.admission.requests == 0, within_s=10.0)
        assert not made.core.at_rest.is_set(), "its KV is still wanted"
        made.release("a")
        assert made.core.at_rest.is_set()


async def test_an_engine_that_does_not_take_a_lease_back_is_counted_and_one_that_died_is_lost_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with playing(abort_timeout_s=0.01) as made:
        for name in ("a", "b", "c"):
            await made.submit(name)
            made.engine.end(name)
        made.engine.hangs = True
        made.release("a")
        await made.core.background.wait(10.0)
        assert made.registry.get_sample_value("baton_worker_lease_release_failures_total") == 1.0
        assert not made.core.engine_lost.is_set()
        made.engine.dead = True
        made.release("b")
        made.release("c")
        await made.core.background.wait(10.0)
        assert made.core.engine_lost.is_set() and made.front.failure is not None
        assert sum(record.levelname == "CRITICAL" for record in caplog.records) == 1
