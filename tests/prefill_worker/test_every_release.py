"""Every way a hand-off can end frees its KV by a message: no lease and no block is left, and no timer had to do it.

Leases here last far longer than any test waits. Scheduler, workers and front proxy are real, the engines are fake.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from decode_worker.config import DecodeLimits
from engine.config import FakeEngineConfig
from front_proxy.request.generation import GenerationDelta
from prefill_worker.config import PrefillWorkerConfig
from runtime.failures import FailureError
from tests.support.in_process_cluster import WAIT_S, Cluster, cluster, collect, request
from tests.support.in_process_worker import InProcessWorker, StartWorker, start_worker
from tests.support.polling import until
from worker.lifecycle import Event

__all__ = ["start_worker"]

HOUR_S = 3600.0
SLOW_PREFILL = FakeEngineConfig(prefill_us_per_token=20_000)
SLOW_PULL = FakeEngineConfig(pull_us_per_block=300_000)


@asynccontextmanager
async def pair(
    start: StartWorker,
    *,
    prefill: FakeEngineConfig | None = None,
    decode: FakeEngineConfig | None = None,
    decode_limits: DecodeLimits | None = None,
    decodes: int = 1,
    **front_proxy: Any,
) -> AsyncIterator[Cluster]:
    """One prefill worker whose leases last an hour, and ``decodes`` decode workers."""

    @functools.wraps(start)
    async def made(role: str, **wanted: Any) -> InProcessWorker:
        if role == "prefill":
            settings: Any = PrefillWorkerConfig(lease_s=HOUR_S)
            wanted |= {"fake": prefill or FakeEngineConfig(), "settings": settings}
        else:
            wanted |= {"fake": decode or FakeEngineConfig(), "role_limits": decode_limits}
        worker: InProcessWorker = await start(role, **wanted)
        return worker

    async with cluster(made, prefills=1, decodes=decodes, **front_proxy) as it:
        yield it


async def until_pulling(it: Cluster) -> None:
    """A decode engine reads KV that the prefill worker holds."""
    holder, *takers = it.workers
    await until(
        lambda: len(holder.core.role.leases) == 1 and any(taker.engine.load().requests_waiting for taker in takers),
        within_s=WAIT_S,
    )


async def nothing_is_held(*workers: InProcessWorker) -> None:
    for worker in workers:
        await worker.settled()
        assert not worker.core.role.leases.oldest(1)
        value = worker.core.metrics.registry.get_sample_value("baton_worker_lease_events_total", {"event": "expired"})
        assert not value, "a timer freed it"


def tokens_in(deltas: list[GenerationDelta]) -> int:
    return sum(len(delta.token_ids) for delta in deltas)


async def test_a_finished_request(start_worker: StartWorker) -> None:
    async with pair(start_worker) as it:
        await collect(it.dispatcher, request(1, 8))
        await nothing_is_held(*it.workers)


async def test_a_decode_worker_that_refuses_the_hand_off(start_worker: StartWorker) -> None:
    picky = DecodeLimits(lease_margin_s=2 * HOUR_S)
    async with pair(start_worker, decode_limits=picky) as it:
        assert tokens_in(await collect(it.dispatcher, request(1, 8))) == 8
        refused = it.workers[1].core.metrics.registry.get_sample_value(
            "baton_worker_refusals_total", {"reason": "handoff_expired"}
        )
        assert refused
        await nothing_is_held(*it.workers)


async def test_a_pull_that_fails_and_is_computed_again(start_worker: StartWorker) -> None:
    async with pair(start_worker, decode=FakeEngineConfig(pull_failure_every=1)) as it:
        assert tokens_in(await collect(it.dispatcher, request(1, 8))) == 8
        await nothing_is_held(*it.workers)


async def a_client_leaves(it: Cluster, task: asyncio.Task[Any]) -> None:
    task.cancel()


async def a_front_proxy_ends(it: Cluster, task: asyncio.Task[Any]) -> None:
    await it.dispatcher.close()


async def a_decode_worker_dies(it: Cluster, task: asyncio.Task[Any]) -> None:
    victim = next(taker for taker in it.workers[1:] if taker.engine.load().requests_waiting)
    victim.engine.die()
    it.workers.remove(victim)


async def the_prefill_worker_drains(it: Cluster, task: asyncio.Task[Any]) -> None:
    it.workers[0].core.happen(Event.DRAIN_ASKED)
    await asyncio.wait_for(it.workers[0].core.at_rest.wait(), WAIT_S)
    # The drain waited for the reader.
    assert it.workers[1].engine.load().kv_bytes_in > 0


async def the_prefill_worker_is_told_to_stop_at_once(it: Cluster, task: asyncio.Task[Any]) -> None:
    holder = it.workers[0]
    holder.core.happen(Event.DRAIN_ASKED)
    holder.core.happen(Event.TIME_UP)
    await nothing_is_held(holder)


async def the_stream_to_the_prefill_worker_breaks(it: Cluster, task: asyncio.Task[Any]) -> None:
    """The holder frees what cannot be released any more; a worker that still reads it must prove what it read."""
    it.workers[0].core.fail_streams("the connection is cut")
    await it.workers[0].settled()


Fault = Callable[[Cluster, asyncio.Task[Any]], Awaitable[None]]


@pytest.mark.parametrize("fault", [a_client_leaves, a_front_proxy_ends])
async def test_during_the_prefill(start_worker: StartWorker, fault: Fault) -> None:
    async with pair(start_worker, prefill=SLOW_PREFILL) as it:
        task = asyncio.create_task(collect(it.dispatcher, request(1, 8)))
        await until(lambda: it.workers[0].engine.load().requests_running == 1, within_s=WAIT_S)
        await fault(it, task)
        await asyncio.wait({task}, timeout=WAIT_S)
        assert task.cancelled() or isinstance(task.exception(), FailureError)
        await nothing_is_held(*it.workers)


@pytest.mark.parametrize(
    ("fault", "answered"),
    [
        (a_client_leaves, False),
        (a_front_proxy_ends, False),
        (a_decode_worker_dies, True),
        (the_prefill_worker_drains, True),
        (the_prefill_worker_is_told_to_stop_at_once, True),
        (the_stream_to_the_prefill_worker_breaks, True),
    ],
)
async def test_during_the_pull(start_worker: StartWorker, fault: Fault, answered: bool) -> None:
    async with pair(start_worker, decode=SLOW_PULL, decodes=2 if fault is a_decode_worker_dies else 1) as it:
        task = asyncio.create_task(collect(it.dispatcher, request(1, 8)))
        await until_pulling(it)
        await fault(it, task)
        await asyncio.wait({task}, timeout=WAIT_S)
        if answered:
            assert tokens_in(task.result()) == 8
        else:
            assert task.cancelled() or isinstance(task.exception(), FailureError)
        await nothing_is_held(*it.workers)
