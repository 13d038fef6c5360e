"""What the shell around one request's flow does by itself: clocks, late words, and the end when the flow is broken."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from front_proxy.request.bill import Bill
from front_proxy.request.events import HolderLost
from front_proxy.request.work import Stage, WorkerOutput
from runtime.failures import Failure, FailureError, FailureKind
from tests.support.fake_cluster import (
    P0,
    PLAN_S,
    PREFILL_S,
    PULL_S,
    STEP_S,
    TOKENS,
    WHOLE_S,
    collect,
    generation,
    serving,
    tokens_of,
)
from tests.support.virtual_time import virtual_time

STAGES = {
    "prefilling": PLAN_S + PREFILL_S / 2,
    "pulling": PLAN_S + PREFILL_S + PULL_S / 2,
    "decoding": PLAN_S + PREFILL_S + PULL_S + 2.5 * STEP_S,
}


@pytest.mark.parametrize("stage", STAGES)
@virtual_time
async def test_a_request_whose_flow_broke_holds_nothing_also_when_a_hand_off_comes_late(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as (dispatcher, cluster, _):
        reader = asyncio.create_task(collect(dispatcher, generation()))
        await asyncio.sleep(STAGES[stage])
        run = dispatcher._runs["r"]

        def broken(event: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(run.flow, "handle", broken)
        run.feed(HolderLost(worker_id="any", epoch=1))
        assert cluster.held == (0, 0, 0)
        with pytest.raises(FailureError):
            await reader
        await asyncio.sleep(WHOLE_S)
        assert cluster.held == (0, 0, 0) and dispatcher.in_flight == 0


@virtual_time
async def test_a_decode_that_cannot_be_started_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async with serving() as (dispatcher, cluster, _):
        well = asyncio.create_task(collect(dispatcher, generation("well")))
        ill = dispatcher.generate(generation("ill"))
        monkeypatch.setattr(dispatcher._runs["ill"], "_start_decode", broken)
        with pytest.raises(FailureError) as caught:
            _ = [delta async for delta in ill]
        assert caught.value.failure.kind is FailureKind.INTERNAL
        assert len(tokens_of(await well)) == TOKENS
        assert cluster.held == (0, 0, 0) and dispatcher.in_flight == 0


@pytest.mark.parametrize("how", ["finished", "failed", "left while it waited for room"])
@virtual_time
async def test_a_request_that_is_over_is_kept_by_nothing(how: str) -> None:
    async with serving(attempts_max=2, deadline_s=1000.0) as (dispatcher, cluster, _):
        if how != "finished":
            cluster.fail[Stage.PREFILL] = Failure(kind=FailureKind.UNAVAILABLE, message="it died")
            cluster.full = how.startswith("left")
        reader = asyncio.create_task(collect(dispatcher, generation()))
        await asyncio.sleep(PLAN_S * 2.5)
        run = weakref.ref(dispatcher._runs["r"])
        if how == "failed":
            cluster.fail[Stage.PREFILL] = Failure(kind=FailureKind.UNAVAILABLE, message="it died")
        if how.startswith("left"):
            reader.cancel()
        await asyncio.wait({reader}, timeout=100.0)
        assert (reader.done() and not reader.cancelled()) or how.startswith("left")
        if not reader.cancelled():
            reader.exception()
        del reader
        await asyncio.sleep(0.0)
        gc.collect()
        assert run() is None, "a timer or a queue still knows it"


@pytest.mark.parametrize("counted", [False, True])
@virtual_time
async def test_a_request_that_was_read_is_freed_without_garbage_collection(counted: bool) -> None:
    """In circles, what requests left made a front proxy slower than all that is counted of them."""
    bill = Bill(b"u" * 16, key_id="", team="a", model="demo", api="", wall_s=0.0)
    async with serving() as (dispatcher, _cluster, _):
        reader = asyncio.create_task(collect(dispatcher, generation(account=bill.part(3) if counted else None)))
        await asyncio.sleep(PLAN_S * 2.5)
        run = weakref.ref(dispatcher._runs["r"])
        gc.disable()
        try:
            assert len(tokens_of(await reader)) == TOKENS
            del reader
            await asyncio.sleep(0.0)
            assert run() is None
        finally:
            gc.enable()


@virtual_time
async def test_late_words_of_an_abandoned_attempt_do_not_pass_for_life_in_the_present_one() -> None:
    async with serving(stream_stall_timeout_s=2.0, stall_check_interval_s=0.1) as (dispatcher, cluster, _):
        loop = asyncio.get_running_loop()
        cluster.fail[Stage.DECODE] = Failure(kind=FailureKind.UNAVAILABLE, message="it died")
        reader = asyncio.create_task(collect(dispatcher, generation()))
        await asyncio.sleep(WHOLE_S)
        cluster.freeze_after = 2
        await asyncio.sleep(WHOLE_S)
        began_s, run = loop.time(), dispatcher._runs["r"]
        while not reader.done() and loop.time() < began_s + 10.0:
            run.on_word(1, Stage.DECODE, WorkerOutput(token_ids=[7]))
            await asyncio.sleep(0.05)
        assert tokens_of(await reader) == [100, 101, 102, 103, 104]
        assert loop.time() - began_s < 3.0


@virtual_time
async def test_a_lost_worker_is_told_of_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (dispatcher, _cluster, _):
        told: list[str] = []
        monkeypatch.setattr(dispatcher._scheduler, "suspect", lambda worker, _why: told.append(worker.worker_id))
        dispatcher._on_worker_lost(P0, "killed")
        assert told == ["prefill-0"]


@virtual_time
async def test_two_requests_of_one_name_do_not_run_at_once() -> None:
    async with serving() as (dispatcher, cluster, _):
        first = asyncio.create_task(collect(dispatcher, generation("r")))
        await asyncio.sleep(STAGES["pulling"])
        with pytest.raises(FailureError) as caught:
            await collect(dispatcher, generation("r"))
        assert caught.value.failure.kind is FailureKind.BAD_REQUEST
        assert len(tokens_of(await first)) == TOKENS and cluster.held == (0, 0, 0)
        assert len(tokens_of(await collect(dispatcher, generation("r")))) == TOKENS
