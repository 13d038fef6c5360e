"""The dispatcher over a real scheduler and real workers in this process; only the engines are fake."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from engine.config import FakeEngineConfig
from engine.protocol import EngineRequest
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.request.generation import GenerationDelta, GenerationRequest
from runtime.failures import FailureError
from runtime.rpc.grpc_server import start_server
from runtime.timing.clock import SystemClock
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.metrics import SchedulerMetrics
from scheduler.service import add_services, status_service
from scheduler.shell import SchedulerShell
from tests.polling import until
from tests.support.front_proxy_settings import configured
from tests.worker.conftest import InProcessWorker, StartWorker, start_worker
from worker.config import WorkerConfig, WorkerLimits
from worker.lifecycle import Event
from worker.session import SchedulerSession

__all__ = ["start_worker"]

WAIT_S = 20.0


class Cluster:
    """Everything of one small cluster."""

    def __init__(self, dispatcher: Dispatcher, core: SchedulerCore, workers: list[InProcessWorker]) -> None:
        self.dispatcher, self.core, self.workers = dispatcher, core, workers

    async def settled(self) -> None:
        for worker in self.workers:
            await worker.settled()
        front = self.dispatcher
        await until(lambda: not (self.core.plans_in_flight or front.handoffs_held or front.in_flight), within_s=WAIT_S)
        self.core.check()


@asynccontextmanager
async def cluster(
    start: StartWorker, *, prefills: int = 2, decodes: int = 2, fake: FakeEngineConfig | None = None, **settings: Any
) -> AsyncIterator[Cluster]:
    config = SchedulerParameters()
    core = SchedulerCore(config, random.Random(1))
    shell = SchedulerShell(config, core, SystemClock(), SchedulerMetrics(CollectorRegistry()))
    status = status_service(shell, epoch=1)
    server = await start_server(
        "127.0.0.1", 0, lambda it: add_services(shell, status, it), message_bytes_max=config.message_bytes_max
    )
    workers = [
        await start(
            role,
            config=WorkerConfig(scheduler_address=server.address),
            limits=WorkerLimits(load_interval_s=0.01),
            fake=fake or FakeEngineConfig(),
        )
        for role in ["prefill"] * prefills + ["decode"] * decodes
    ]
    sessions = [SchedulerSession(worker.core) for worker in workers]
    tasks = [asyncio.create_task(session.run()) for session in sessions]
    front, limits = configured(scheduler_address=server.address, **settings)
    dispatcher = Dispatcher(front, limits=limits, metrics=DispatchMetrics(CollectorRegistry()))
    running = asyncio.create_task(dispatcher.run())
    try:
        for session in sessions:
            await asyncio.wait_for(session.registered.wait(), WAIT_S)
        await dispatcher.wait_usable(WAIT_S)
        yield Cluster(dispatcher, core, workers)
    finally:
        await dispatcher.close()
        await asyncio.wait_for(running, WAIT_S)
        for session in sessions:
            session.leave("the test is over")
        await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)
        shell.close()
        await server.stop(0)


class Behind:
    """What is left of an output behind shown tokens."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def first(self, resume_tokens: int) -> bytes:
        return msgspec.msgpack.encode({"max_tokens": 1})

    def rest(self, resume_tokens: int) -> bytes:
        return msgspec.msgpack.encode({"max_tokens": self._tokens - resume_tokens})


def request(number: int, tokens: int, prompt: int = 40, *, continuing: bool = True) -> GenerationRequest:
    def sampling(max_tokens: int) -> bytes:
        return msgspec.msgpack.encode({"max_tokens": max_tokens})

    return GenerationRequest(
        engine_request=EngineRequest(
            request_id=f"r{number}", token_ids=list(range(number, number + prompt)), sampling=sampling(tokens)
        ),
        prefill_sampling=sampling(1),
        continuation=Behind(tokens) if continuing else None,
        output_tokens_max=tokens,
    )


async def collect(dispatcher: Dispatcher, wanted: GenerationRequest) -> list[GenerationDelta]:
    return [delta async for delta in dispatcher.generate(wanted)]


async def test_a_request_takes_both_workers_and_leaves_nothing(start_worker: StartWorker) -> None:
    async with cluster(start_worker, prefills=1, decodes=1) as it:
        deltas = await collect(it.dispatcher, request(1, 8))
        assert sum(len(delta.token_ids) for delta in deltas) == 8
        assert deltas[0].phases is not None and deltas[0].phases.plan_s > 0
        assert any(delta.decode_worker == it.workers[1].core.worker_id for delta in deltas)
        assert it.workers[1].engine.load().kv_bytes_in > 0
        await it.settled()


async def test_without_a_prefill_worker_the_answer_is_the_same(start_worker: StartWorker) -> None:
    async with cluster(start_worker, prefills=1, decodes=1) as whole:
        expected = [t for delta in await collect(whole.dispatcher, request(1, 8)) for t in delta.token_ids]
    async with cluster(start_worker, prefills=0, decodes=1) as half:
        assert [t for delta in await collect(half.dispatcher, request(1, 8)) for t in delta.token_ids] == expected


@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_cancellations_leaves_nothing(start_worker: StartWorker, seed: int) -> None:
    rng = random.Random(seed)
    async with cluster(start_worker) as it:

        async def one(number: int) -> None:
            await asyncio.sleep(rng.random() * 0.2)
            task = asyncio.create_task(collect(it.dispatcher, request(number, rng.randint(1, 30), rng.randint(1, 200))))
            done, _ = await asyncio.wait({task}, timeout=rng.random() * 0.15)
            if not done:
                task.cancel()
                await asyncio.wait({task})
            assert task.cancelled() or task.exception() is None or isinstance(task.exception(), FailureError)

        await asyncio.gather(*(one(number) for number in range(200)))
        await it.settled()


def tokens_of(deltas: list[GenerationDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("continuing", [True, False], ids=["continue", "replay"])
@pytest.mark.parametrize("how", ["dies", "drains", "freezes"])
async def test_streams_survive_their_decode_worker(start_worker: StartWorker, how: str, continuing: bool) -> None:
    numbers = range(6)
    async with cluster(
        start_worker, stream_stall_timeout_s=0.5, prefill_stall_timeout_s=5.0, stall_check_interval_s=0.1
    ) as it:
        wanted = [request(number, 60, continuing=continuing) for number in numbers]
        undisturbed = [tokens_of(await collect(it.dispatcher, one)) for one in wanted]
        streams = [it.dispatcher.generate(one) for one in wanted]
        begun: list[list[GenerationDelta]] = []
        for stream in streams:
            begun.append([await anext(stream) for _ in range(5)])
        victim = next(worker for worker in it.workers if worker.core.role.name == "decode" and not worker.core.idle)
        if how == "dies":
            victim.engine.die()
        elif how == "drains":
            victim.core.happen(Event.DRAIN_ASKED)
            victim.core.happen(Event.TIME_UP)
        else:
            stepper = victim.engine._stepper
            assert stepper is not None
            stepper.cancel()
        rest = await asyncio.gather(*(_read(stream) for stream in streams))
        got = [tokens_of(first + more) for first, more in zip(begun, rest, strict=True)]
        assert got == undisturbed
        assert [more[-1].finish is not None for more in rest] == [True] * len(numbers)
        others = [worker for worker in it.workers if worker is not victim]
        for worker in others:
            await worker.settled()


async def _read(stream: AsyncIterator[GenerationDelta]) -> list[GenerationDelta]:
    return [delta async for delta in stream]


@pytest.mark.parametrize("prefills", [1, 2])
async def test_a_prefill_workers_death_is_survived(start_worker: StartWorker, prefills: int) -> None:
    async with cluster(start_worker, prefills=prefills, decodes=1) as it:
        wanted = [request(number, 20) for number in range(8)]
        undisturbed = [tokens_of(await collect(it.dispatcher, one)) for one in wanted]
        tasks = [asyncio.create_task(collect(it.dispatcher, one)) for one in wanted]
        victim = it.workers[0]
        async with asyncio.timeout(WAIT_S):
            while victim.core.idle:
                victim.core.changed.clear()
                await victim.core.changed.wait()
        victim.engine.die()
        assert [tokens_of(deltas) for deltas in await asyncio.gather(*tasks)] == undisturbed
        for worker in it.workers[1:]:
            await worker.settled()
