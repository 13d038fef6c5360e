"""A dispatcher over a real scheduler and real workers in this process; only the engines are fake."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from engine.config import FakeEngineConfig
from engine.protocol import EngineRequest
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.request.generation import GenerationDelta, GenerationRequest
from front_proxy.request.prompt_keys import PromptKeys
from runtime.rpc.grpc_server import start_server
from runtime.timing.clock import SystemClock
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.metrics import SchedulerMetrics
from scheduler.service import add_services, status_service
from scheduler.shell import SchedulerShell
from tests.support.front_proxy_settings import configured
from tests.support.in_process_worker import InProcessWorker, StartWorker
from tests.support.polling import until
from worker.config import WorkerConfig, WorkerLimits
from worker.session import SchedulerSession

WAIT_S = 20.0


class Cluster:
    """Everything of one small cluster. ``core`` is the scheduler's, where that runs in this process."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        workers: list[InProcessWorker],
        registry: CollectorRegistry,
        core: SchedulerCore | None,
    ) -> None:
        self.dispatcher, self.workers, self.registry, self.core = dispatcher, workers, registry, core

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"baton_front_proxy_{name}", labels) or 0.0

    async def until(self, holds: Callable[[], object]) -> None:
        await until(holds, within_s=WAIT_S)

    async def settled(self) -> None:
        """Wait until nothing is held anywhere."""
        for worker in self.workers:
            await worker.settled()
        front = self.dispatcher
        await self.until(lambda: not (front.handoffs_held or front.in_flight))
        if (core := self.core) is not None:
            await self.until(lambda: not core.plans_in_flight)
            core.check()


@asynccontextmanager
async def cluster(
    start: StartWorker,
    *,
    prefills: int = 2,
    decodes: int = 2,
    fake: FakeEngineConfig | None = None,
    scheduler_address: str = "",
    **settings: Any,
) -> AsyncIterator[Cluster]:
    """``settings`` are the front proxy's. Without ``scheduler_address`` a scheduler runs in this process too."""
    registry = CollectorRegistry()
    async with contextlib.AsyncExitStack() as stack:
        core = None
        if not scheduler_address:
            core, scheduler_address = await stack.enter_async_context(_scheduler())
        workers = [
            await start(
                role,
                config=WorkerConfig(scheduler_address=scheduler_address),
                limits=WorkerLimits(load_interval_s=0.01),
                fake=fake or FakeEngineConfig(),
            )
            for role in ["prefill"] * prefills + ["decode"] * decodes
        ]
        sessions = [SchedulerSession(worker.core) for worker in workers]
        tasks = [asyncio.create_task(session.run()) for session in sessions]
        front, limits = configured(scheduler_address=scheduler_address, **settings)
        dispatcher = Dispatcher(front, limits=limits, metrics=DispatchMetrics(registry))
        running = asyncio.create_task(dispatcher.run())
        try:
            for session in sessions:
                await asyncio.wait_for(session.registered.wait(), WAIT_S)
            await dispatcher.wait_usable(WAIT_S)
            yield Cluster(dispatcher, workers, registry, core)
        finally:
            await dispatcher.close()
            await asyncio.wait_for(running, WAIT_S)
            for session in sessions:
                session.leave("the test is over")
            await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)


@asynccontextmanager
async def _scheduler() -> AsyncIterator[tuple[SchedulerCore, str]]:
    config = SchedulerParameters()
    core = SchedulerCore(config, random.Random(1))
    shell = SchedulerShell(config, core, SystemClock(), SchedulerMetrics(CollectorRegistry()))
    status = status_service(shell, epoch=1)
    server = await start_server(
        "127.0.0.1", 0, lambda it: add_services(shell, status, it), message_bytes_max=config.message_bytes_max
    )
    try:
        yield core, server.address
    finally:
        shell.close()
        await server.stop(0)


class Behind:
    """What is left of an output behind shown tokens."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def first(self, resume_tokens: int) -> bytes:
        return _sampling(1)

    def rest(self, resume_tokens: int) -> bytes:
        return _sampling(self._tokens - resume_tokens)


def _sampling(max_tokens: int) -> bytes:
    return msgspec.msgpack.encode({"max_tokens": max_tokens})


def request(number: int, tokens: int, prompt: int = 40, *, continuing: bool = True) -> GenerationRequest:
    """A request of ``tokens`` tokens on a prompt of its own."""
    return GenerationRequest(
        engine_request=EngineRequest(
            request_id=f"r{number}", token_ids=list(range(number, number + prompt)), sampling=_sampling(tokens)
        ),
        prefill_sampling=_sampling(1),
        continuation=Behind(tokens) if continuing else None,
        output_tokens_max=tokens,
        prompt_keys=PromptKeys(range(number, number + prompt)),
    )


async def collect(dispatcher: Dispatcher, wanted: GenerationRequest) -> list[GenerationDelta]:
    return [delta async for delta in dispatcher.generate(wanted)]


def tokens_of(deltas: list[GenerationDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
