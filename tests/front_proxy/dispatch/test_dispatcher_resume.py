"""The dispatcher takes work from workers that stand still, and bounds all retries together; in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from front_proxy.planning.cluster_view import WorkerEntry
from front_proxy.request.prompt_keys import PromptKeys
from front_proxy.request.work import Stage
from kv_transfer.prefix.block_keys import prompt_keys
from runtime.failures import Failure, FailureError, FailureKind
from scheduler.api.worker_info import WorkerLoad
from tests.scheduler.cast import worker_info
from tests.support.fake_cluster import (
    P0,
    TOKENS,
    WHOLE_S,
    collect,
    generation,
    serving,
    tokens_of,
)
from tests.support.virtual_time import virtual_time


@virtual_time
async def test_a_stalled_stream_goes_on_behind_what_was_shown_within_the_bound() -> None:
    async with serving(stream_stall_timeout_s=2.0, stall_check_interval_s=0.1) as (dispatcher, cluster, registry):
        cluster.freeze_after = 2
        assert not dispatcher._view.apply([WorkerEntry(worker_info("d0", block_size_tokens=2), WorkerLoad())]).gone
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        keys = PromptKeys([1, 2, 3])
        assert tokens_of(await collect(dispatcher, generation(prompt_keys=keys))) == [100, 101, 102, 103, 104]
        assert 2.0 <= loop.time() - began_s <= 2.0 + 0.2 + 2 * WHOLE_S
        samplings = [sent.engine_request.sampling for sent in cluster.submissions]
        assert samplings == [b"prefill", b"rest behind 1", b"first behind 3", b"rest behind 4"]
        assert cluster.submissions[2].engine_request.token_ids == [1, 2, 3, 100, 101, 102]
        last = cluster.submissions[3]
        assert len(last.engine_request.token_ids) == 7 and last.handoff is not None
        again = cluster.questions[1]
        assert (again.prompt_tokens, again.output_tokens_max) == (6, 2)
        assert [len(question.block_keys) for question in cluster.questions] == [8, 24]
        assert again.block_keys == prompt_keys([1, 2, 3, 100, 101, 102], 2)
        assert again.excluded_worker_ids == {"decode-0"}
        assert cluster.suspects == ["decode-0"] and cluster.held == (0, 0, 0)
        assert registry.get_sample_value("baton_front_proxy_resumes_total", {"how": "continue"}) == 1
        assert registry.get_sample_value("baton_front_proxy_stalls_total", {"stage": "decode"}) == 1


@virtual_time
async def test_a_replay_that_gives_other_tokens_fails_instead_of_showing_them() -> None:
    async with serving(stream_stall_timeout_s=2.0) as (dispatcher, cluster, registry):
        cluster.freeze_after = 3
        stream = dispatcher.generate(generation(continuation=None))
        shown = [(await anext(stream)).token_ids for _ in range(3)]
        assert shown == [[100], [101], [102]]
        assert cluster.submissions[1].engine_request.sampling == b"decode"
        cluster.diverge = True
        with pytest.raises(FailureError, match="gave other ones") as caught:
            await anext(stream)
        assert caught.value.failure.kind is FailureKind.INTERNAL
        assert cluster.held == (0, 0, 0)
        assert cluster.submissions[3].engine_request.token_ids == [1, 2, 3]
        assert registry.get_sample_value("baton_front_proxy_resumes_total", {"how": "replay"}) == 1
        assert registry.get_sample_value("baton_front_proxy_replays_diverged_total") == 1


@virtual_time
async def test_a_stream_alone_on_a_worker_that_lives_gets_the_longer_bound() -> None:
    settings = {"stream_stall_timeout_s": 2.0, "stream_stall_alive_timeout_s": 7.0}
    async with serving(**settings) as (dispatcher, cluster, _):
        cluster.freeze_after, cluster.alive = 2, True
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert len(tokens_of(await collect(dispatcher, generation()))) == TOKENS
        assert loop.time() - began_s >= 7.0


@virtual_time
async def test_a_process_that_stood_still_itself_blames_no_worker() -> None:
    async with serving(stream_stall_timeout_s=2.0, stall_check_interval_s=0.5) as (dispatcher, cluster, _):
        cluster.freeze_after = 2
        task = asyncio.create_task(collect(dispatcher, generation()))
        await asyncio.sleep(1.0)
        # The loop's clock moves on as if this process had been stopped.
        asyncio.get_running_loop()._idle.now_s += 60.0  # type: ignore[attr-defined]
        await asyncio.sleep(1.5)
        assert cluster.suspects == [] and not task.done()
        await task
        assert cluster.suspects == ["decode-0"]


@virtual_time
async def test_a_pull_whose_holder_is_lost_has_a_little_time_from_the_loss() -> None:
    settings = {"orphaned_pull_timeout_s": 1.0, "handoff_stall_timeout_s": 100.0, "stall_check_interval_s": 0.1}
    async with serving(**settings) as (dispatcher, cluster, _):
        cluster.freeze_after = 0
        task = asyncio.create_task(collect(dispatcher, generation()))
        await asyncio.sleep(20.0)
        dispatcher._on_worker_lost(P0, "killed")
        await asyncio.sleep(0.8)
        assert len(cluster.questions) == 1, "it may still go on by itself"
        assert tokens_of(await task) == [100, 101, 102, 103, 104]
        assert asyncio.get_running_loop().time() < 21.5
        assert cluster.questions[1].excluded_worker_ids == {"prefill-0"}
        assert cluster.suspects == [], "the decode worker is not to blame"


@virtual_time
async def test_retries_of_all_requests_together_are_bounded() -> None:
    settings = {"retry_budget_burst": 2, "retry_budget_ratio": 0.5, "retry_budget_per_s": 0.0}
    async with serving(**settings) as (dispatcher, cluster, registry):
        served = []
        for number in range(6):
            cluster.fail[Stage.DECODE] = Failure(kind=FailureKind.UNAVAILABLE, message="the worker died")
            try:
                served.append(len(await collect(dispatcher, generation(f"r{number}"))) == TOKENS)
            except FailureError as error:
                served.append("the worker died" not in error.failure.message)
        assert served == [True, True, True, False, True, False] and cluster.held == (0, 0, 0)
        assert registry.get_sample_value("baton_front_proxy_retries_denied_total") == 2
