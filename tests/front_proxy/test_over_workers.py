"""The dispatcher over a real scheduler and real workers in this process; only the engines are fake."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from front_proxy.request.generation import GenerationDelta, GenerationRequest
from runtime.failures import FailureError
from tests.support.in_process_cluster import WAIT_S, Cluster, cluster, collect, request, tokens_of
from tests.support.in_process_worker import StartWorker
from worker.lifecycle import Event

# Long enough that each stream is under way when its worker fails.
TOKENS = 40


async def undisturbed(it: Cluster, wanted: list[GenerationRequest]) -> list[list[int]]:
    return [tokens_of(deltas) for deltas in await asyncio.gather(*(collect(it.dispatcher, one) for one in wanted))]


async def test_a_request_takes_both_workers_and_without_a_prefill_worker_the_answer_is_the_same(
    start_worker: StartWorker,
) -> None:
    async with cluster(start_worker, prefills=1, decodes=1) as whole:
        deltas = await collect(whole.dispatcher, request(1, 8))
        assert len(tokens_of(deltas)) == 8
        assert any(delta.decode_worker == whole.workers[1].core.worker_id for delta in deltas)
        assert whole.workers[1].engine.load().kv_bytes_in > 0
        await whole.settled()
    async with cluster(start_worker, prefills=0, decodes=1) as half:
        assert tokens_of(await collect(half.dispatcher, request(1, 8))) == tokens_of(deltas)


async def test_a_storm_of_cancellations_leaves_nothing(start_worker: StartWorker) -> None:
    rng = random.Random(1)
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


@pytest.mark.parametrize("continuing", [True, False], ids=["continue", "replay"])
@pytest.mark.parametrize("how", ["dies", "drains", "freezes"])
async def test_streams_survive_their_decode_worker(start_worker: StartWorker, how: str, continuing: bool) -> None:
    numbers = range(6)
    async with cluster(
        start_worker, stream_stall_timeout_s=0.3, prefill_stall_timeout_s=5.0, stall_check_interval_s=0.05
    ) as it:
        wanted = [request(number, TOKENS, continuing=continuing) for number in numbers]
        expected = await undisturbed(it, wanted)
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
        assert got == expected
        assert [more[-1].finish is not None for more in rest] == [True] * len(numbers)
        for worker in it.workers:
            if worker is not victim:
                await worker.settled()
        assert it.value("stream_losses_total", peer="scheduler") == 0, "it was sent what it must not be sent"


async def _read(stream: AsyncIterator[GenerationDelta]) -> list[GenerationDelta]:
    return [delta async for delta in stream]


@pytest.mark.parametrize("prefills", [1, 2])
async def test_a_prefill_workers_death_is_survived(start_worker: StartWorker, prefills: int) -> None:
    async with cluster(start_worker, prefills=prefills, decodes=1) as it:
        wanted = [request(number, 20) for number in range(8)]
        expected = await undisturbed(it, wanted)
        tasks = [asyncio.create_task(collect(it.dispatcher, one)) for one in wanted]
        victim = it.workers[0]
        async with asyncio.timeout(WAIT_S):
            while victim.core.idle:
                victim.core.changed.clear()
                await victim.core.changed.wait()
        victim.engine.die()
        assert [tokens_of(deltas) for deltas in await asyncio.gather(*tasks)] == expected
        for worker in it.workers[1:]:
            await worker.settled()


async def test_the_scheduler_knows_which_workers_hold_a_prompt_under_the_keys_that_are_asked_with(
    start_worker: StartWorker,
) -> None:
    async with cluster(start_worker, prefills=1, decodes=1) as it:
        wanted = request(1, 8)
        assert it.core is not None and wanted.prompt_keys is not None
        prefixes, keys = it.core.prefixes, wanted.prompt_keys.packed(16)
        await collect(it.dispatcher, wanted)
        holders = {prefixes.feed.holder(worker.core.worker_id) for worker in it.workers}
        await it.until(lambda: prefixes.index.longest(keys) == dict.fromkeys(holders, 2))
