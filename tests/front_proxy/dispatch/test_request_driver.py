"""What the shell around one request's flow does by itself: clocks, late words, and the end when the flow is broken."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from front_proxy.request.events import HolderLost
from front_proxy.request.work import Stage, WorkerOutput
from runtime.failures import Failure, FailureError, FailureKind
from simulation.kernel import virtual_loop
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

STAGES = {
    "prefilling": PLAN_S + PREFILL_S / 2,
    "pulling": PLAN_S + PREFILL_S + PULL_S / 2,
    "decoding": PLAN_S + PREFILL_S + PULL_S + 2.5 * STEP_S,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_whose_flow_broke_holds_nothing_also_when_a_hand_off_comes_late(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
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

    virtual_loop.run(play())


@pytest.mark.parametrize("how", ["finished", "failed", "left while it waited for room"])
def test_a_request_that_is_over_is_kept_by_nothing(how: str) -> None:
    async def play() -> None:
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

    virtual_loop.run(play())


def test_late_words_of_an_abandoned_attempt_do_not_pass_for_life_in_the_present_one() -> None:
    async def play() -> None:
        async with serving(stream_stall_timeout_s=2.0, stall_check_interval_s=0.1) as (dispatcher, cluster, _):
            loop = asyncio.get_running_loop()
            cluster.fail[Stage.DECODE] = Failure(kind=FailureKind.UNAVAILABLE, message="it died")
            reader = asyncio.create_task(collect(dispatcher, generation()))
            await asyncio.sleep(WHOLE_S)
            cluster.freeze_after = 2
            await asyncio.sleep(WHOLE_S)
            began_s, run = loop.time(), dispatcher._runs["r"]
            while not reader.done() and loop.time() < began_s + 10.0:
                run.on_output(1, Stage.DECODE, WorkerOutput(token_ids=[7]))
                await asyncio.sleep(0.05)
            assert tokens_of(await reader) == [100, 101, 102, 103, 104]
            assert loop.time() - began_s < 3.0

    virtual_loop.run(play())


def test_a_pull_whose_holder_is_lost_has_its_time_from_the_loss() -> None:
    async def play() -> None:
        settings = {"orphaned_pull_timeout_s": 1.0, "handoff_stall_timeout_s": 100.0, "stall_check_interval_s": 0.1}
        async with serving(**settings) as (dispatcher, cluster, _):
            cluster.freeze_after = 0
            task = asyncio.create_task(collect(dispatcher, generation()))
            await asyncio.sleep(20.0)
            dispatcher._on_worker_lost(P0, "killed")
            await asyncio.sleep(0.8)
            assert len(cluster.questions) == 1, "it may still go on by itself"
            assert tokens_of(await task) == [100, 101, 102, 103, 104]

    virtual_loop.run(play())


def test_a_lost_worker_is_told_of_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        async with serving() as (dispatcher, _cluster, _):
            told: list[str] = []
            monkeypatch.setattr(dispatcher._scheduler, "suspect", lambda worker, _why: told.append(worker.worker_id))
            dispatcher._on_worker_lost(P0, "killed")
            assert told == ["prefill-0"]

    virtual_loop.run(play())


def test_two_requests_of_one_name_do_not_run_at_once() -> None:
    async def play() -> None:
        async with serving() as (dispatcher, cluster, _):
            first = asyncio.create_task(collect(dispatcher, generation("r")))
            await asyncio.sleep(STAGES["pulling"])
            with pytest.raises(FailureError) as caught:
                await collect(dispatcher, generation("r"))
            assert caught.value.failure.kind is FailureKind.BAD_REQUEST
            assert len(tokens_of(await first)) == TOKENS and cluster.held == (0, 0, 0)
            assert len(tokens_of(await collect(dispatcher, generation("r")))) == TOKENS

    virtual_loop.run(play())


def test_each_request_pays_for_its_share_of_the_retries() -> None:
    async def play() -> None:
        settings = {"retry_budget_burst": 1, "retry_budget_ratio": 1.0, "retry_budget_per_s": 0.0}
        async with serving(**settings) as (dispatcher, cluster, _):
            for number in range(5):
                cluster.fail[Stage.DECODE] = Failure(kind=FailureKind.UNAVAILABLE, message="it died")
                assert len(tokens_of(await collect(dispatcher, generation(f"r{number}")))) == TOKENS

    virtual_loop.run(play())


def test_a_reader_that_is_cancelled_while_it_waits_need_not_close_its_stream() -> None:
    async def play() -> None:
        async with serving() as (dispatcher, cluster, _):
            stream = dispatcher.generate(generation())
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(PLAN_S * 2)
            assert cluster.held == (1, 1, 0)
            reader.cancel()
            await asyncio.wait({reader})
            assert cluster.held == (0, 0, 0) and dispatcher.in_flight == 0

    virtual_loop.run(play())
