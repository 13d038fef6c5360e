"""The dispatcher over workers and a scheduler made of timers, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from engine.protocol import Finish
from front_proxy.dispatch.attempts import Lane
from front_proxy.request.work import Stage
from runtime.failures import Failure, FailureError, FailureKind
from tests.support.fake_cluster import (
    PLAN_S,
    PULL_S,
    TOKENS,
    WHOLE_S,
    Behind,
    collect,
    generation,
    serving,
    tokens_of,
)
from tests.support.virtual_time import virtual_time


@virtual_time
async def test_a_request_runs_through_both_workers_and_leaves_nothing() -> None:
    async with serving() as (dispatcher, cluster, registry):
        deltas = await collect(dispatcher, generation())
        assert tokens_of(deltas) == [100, 101, 102, 103, 104]
        assert deltas[-1].finish == Finish("stop")
        assert [sent.engine_request.sampling for sent in cluster.submissions] == [b"prefill", b"rest behind 1"]
        assert cluster.submissions[1].engine_request.token_ids == [1, 2, 3, 100]
        assert cluster.submissions[1].handoff is not None and cluster.submissions[1].blocks_reserved == 3
        assert cluster.submissions[0].engine_request.request_id != cluster.submissions[1].engine_request.request_id
        assert cluster.held == (0, 0, 0) and cluster.pulled == [True] and dispatcher.in_flight == 0
        assert registry.get_sample_value("baton_front_proxy_requests_total", {"outcome": "finished"}) == 1
        assert registry.get_sample_value("baton_front_proxy_output_tokens_total") == TOKENS


@pytest.mark.parametrize("continuation", [Behind(), None])
@virtual_time
async def test_the_phases_add_up_to_the_time_to_the_first_token(continuation: Behind | None) -> None:
    async with serving() as (dispatcher, _, registry):
        loop = asyncio.get_running_loop()
        before = loop.time()
        stream = dispatcher.generate(generation(continuation=continuation))
        first = await anext(stream)
        passed = loop.time() - before
        assert first.phases is not None
        assert first.phases.total_s == pytest.approx(passed, abs=1e-9)
        assert first.phases.plan_s == pytest.approx(PLAN_S)
        assert first.phases.prefill_s == pytest.approx(0.012) and first.phases.queue_s == pytest.approx(0.004)
        assert first.phases.handoff_s == pytest.approx(0.0 if continuation else PULL_S)
        assert first.phases.decode_admission_s == pytest.approx(0.0 if continuation else 0.001)
        rest = [delta async for delta in stream]
        assert all(delta.phases is None for delta in rest)
        assert registry.get_sample_value("baton_front_proxy_ttft_seconds_count") == 1
        assert registry.get_sample_value("baton_front_proxy_handoff_seconds_count") == 1


@virtual_time
async def test_the_first_token_is_passed_on_before_the_decode_is_ordered() -> None:
    async with serving() as (dispatcher, cluster, _):
        stream = dispatcher.generate(generation())
        await anext(stream)
        assert len(cluster.submissions) == 1
        await asyncio.sleep(0)
        assert len(cluster.submissions) == 2
        await stream.aclose()


@pytest.mark.parametrize(("how", "outcome"), [("left", "cancelled"), ("satisfied", "finished"), ("stopped", "failed")])
@virtual_time
async def test_a_decode_that_waits_for_the_reader_is_dropped_with_its_request(how: str, outcome: str) -> None:
    async with serving() as (dispatcher, cluster, _):
        stream = dispatcher.generate(generation())
        await anext(stream)
        match how:
            case "left":
                await stream.aclose()
            case "satisfied":
                dispatcher.satisfied("r")
            case _:
                dispatcher.stop_runs()
        await asyncio.sleep(2.0)
        assert len(cluster.submissions) == 1 and cluster.held == (0, 0, 0) and dispatcher.in_flight == 0
        assert cluster.outcomes == [outcome], "having enough is no cancellation"


@virtual_time
async def test_a_client_may_leave_at_any_millisecond() -> None:
    for millisecond in range(int(WHOLE_S * 1000) + 5):
        async with serving() as (dispatcher, cluster, _):
            reader = asyncio.create_task(collect(dispatcher, generation()))
            await asyncio.sleep(millisecond / 1000)
            reader.cancel()
            await asyncio.wait({reader})
            await asyncio.sleep(1.0)
            assert cluster.held == (0, 0, 0), f"left after {millisecond} ms"
            assert dispatcher.in_flight == 0


@virtual_time
async def test_no_request_outlives_its_deadline() -> None:
    async with serving(deadline_s=2.0) as (dispatcher, cluster, _):
        cluster.silent = True
        loop = asyncio.get_running_loop()
        for asked_s, expected_s in ((None, 2.0), (0.5, 0.5), (9.0, 2.0)):
            before = loop.time()
            with pytest.raises(FailureError) as caught:
                await collect(dispatcher, generation(deadline_s=asked_s))
            assert caught.value.failure.kind is FailureKind.DEADLINE
            assert loop.time() - before == pytest.approx(expected_s)
        assert cluster.held == (0, 0, 0)


@pytest.mark.parametrize("stage", list(Stage))
@virtual_time
async def test_a_refusal_is_tried_again_unless_it_is_for_good_and_counted(stage: Stage) -> None:
    async with serving() as (dispatcher, cluster, registry):
        cluster.fail[stage] = Failure(kind=FailureKind.STATE_LOST, message="lost")
        assert tokens_of(await collect(dispatcher, generation())) == [100, 101, 102, 103, 104]
        labels = {"stage": stage.value, "reason": "state_lost"}
        assert registry.get_sample_value("baton_front_proxy_retries_total", labels) == 1
        cluster.fail[Stage.PREFILL] = Failure(kind=FailureKind.BAD_REQUEST, message="no such token")
        with pytest.raises(FailureError, match="no such token"):
            await collect(dispatcher, generation())
        assert registry.get_sample_value("baton_front_proxy_failures_total", {"kind": "bad_request"}) == 1
        assert cluster.held == (0, 0, 0)


@virtual_time
async def test_a_slow_reader_is_stopped_before_its_output_fills_the_memory() -> None:
    async with serving(output_deltas_max=2) as (dispatcher, cluster, _):
        stream = dispatcher.generate(generation())
        assert (await anext(stream)).token_ids == [100]
        await asyncio.sleep(1.0)
        assert cluster.held == (0, 0, 0)
        with pytest.raises(FailureError) as caught:
            _ = [delta async for delta in stream]
        assert caught.value.failure.kind is FailureKind.EXHAUSTED


@virtual_time
async def test_what_came_while_the_reader_was_away_is_there_without_waiting() -> None:
    async with serving() as (dispatcher, cluster, _):
        stream = dispatcher.generate(generation())
        assert stream.waiting() is None
        deltas = [await anext(stream)]
        assert stream.waiting() is None
        await asyncio.sleep(1.0)
        while (delta := stream.waiting()) is not None:
            deltas.append(delta)
        assert tokens_of(deltas) == [100, 101, 102, 103, 104] and deltas[-1].finish is not None
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await stream.aclose()
        assert cluster.held == (0, 0, 0) and cluster.outcomes == ["finished"]


@virtual_time
async def test_a_tap_gets_the_tokens_of_the_middle_while_the_reader_waits() -> None:
    async with serving() as (dispatcher, cluster, _):
        stream = dispatcher.generate(generation())
        tapped: list[list[int]] = []

        def take(token_ids: list[int]) -> bool:
            tapped.append(token_ids)
            return True

        stream.tap = take
        read = [delta.token_ids async for delta in stream]
        assert tapped and read[0] == [100] and sorted([*tapped, *read]) == [[100], [101], [102], [103], [104]]

        # It refuses one token: the reader gets this one. What comes while the reader is busy with it is the reader's.
        stream = dispatcher.generate(generation("again"))
        tapped.clear()
        stream.tap = lambda token_ids: token_ids != [102] and take(token_ids)
        read = [delta.token_ids async for delta in stream]
        assert [102] in read and sorted([*tapped, *read]) == [[100], [101], [102], [103], [104]]
        assert cluster.outcomes == ["finished"] * 2


@pytest.mark.parametrize("refused", [[], [103]])
@virtual_time
async def test_a_lane_takes_what_comes_behind_tokens_that_the_tap_took(refused: list[int]) -> None:
    async with serving() as (dispatcher, cluster, _):
        stream = dispatcher.generate(generation())
        taken: list[int] = []

        def lane_of(delivered: list[int]) -> Lane:
            def lane(token_ids: list[int]) -> bool:
                if token_ids == refused:
                    return False
                delivered.extend(token_ids)
                taken.extend(token_ids)
                return True

            return lane

        stream.tap, stream.lane_of = lambda token_ids: token_ids == [102], lane_of
        read = [token async for delta in stream for token in delta.token_ids]
        assert taken == [103][len(refused) :] and read == [100, 101, *refused, 104]
        assert cluster.outcomes == ["finished"] and stream.flow.output_tokens == TOKENS


@virtual_time
async def test_a_tap_that_breaks_fails_its_request_alone() -> None:
    def broken(_: list[int]) -> bool:
        raise ZeroDivisionError

    async with serving() as (dispatcher, cluster, _):
        well = asyncio.create_task(collect(dispatcher, generation("well")))
        ill = dispatcher.generate(generation("ill"))
        ill.tap = broken
        with pytest.raises(FailureError) as caught:
            _ = [delta async for delta in ill]
        assert caught.value.failure.kind is FailureKind.INTERNAL
        assert len(tokens_of(await well)) == TOKENS and cluster.held == (0, 0, 0)
