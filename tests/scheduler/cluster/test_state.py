"""What is counted of one worker, and the workers of the cluster."""

from __future__ import annotations

import pytest

from scheduler.cluster.state import ClusterState
from tests.scheduler.cast import ready, worker


def test_free_blocks_are_what_is_neither_reserved_nor_reported_as_used() -> None:
    decode = worker("d0")
    decode.reserve((1, 1), 30)
    assert decode.free_blocks == 70
    decode.report(ready(kv_blocks_used=45), 1.0, 0.1)
    assert decode.free_blocks == 55
    decode.reserve((1, 2), 20)
    assert decode.free_blocks == 50
    decode.forget((1, 1))
    assert decode.free_blocks == 55
    decode.check()


def test_a_plan_is_reserved_once_and_within_what_is_free_and_a_worker_registered_once() -> None:
    decode, cluster = worker("d0"), ClusterState()
    decode.reserve((1, 1), 3)
    with pytest.raises(AssertionError):
        decode.reserve((1, 1), 3)
    with pytest.raises(AssertionError):
        decode.adopt((1, 1), 3)
    with pytest.raises(AssertionError):
        decode.reserve((1, 2), 101)
    cluster.add(decode)
    with pytest.raises(AssertionError):
        cluster.add(worker("d0", epoch=2))


def test_no_worker_is_forgiven_more_silence_than_there_was() -> None:
    decode = worker("d0")
    decode.forgive(20.0, 5.0)
    assert decode.heard_s == 5.0
    decode.forgive(1.0, 9.0)
    assert decode.heard_s == 6.0


def test_a_report_beyond_the_total_leaves_nothing_free() -> None:
    decode = worker("d0", ready(kv_blocks_used=1000))
    assert decode.free_blocks == 0
    decode.check()


def test_a_prompt_counts_until_a_report_can_include_it() -> None:
    prefill = worker("p0")
    prefill.assign_prefill((1, 1), 500, now_s=1.0)
    assert (prefill.queued_tokens, prefill.request_count) == (500, 1)
    prefill.report(ready(), 1.05, 0.1)
    assert prefill.queued_tokens == 500
    prefill.report(ready(prefill_tokens_queued=500, requests_running=1), 1.1, 0.1)
    assert (prefill.queued_tokens, prefill.request_count) == (500, 1)
    prefill.assign_prefill((1, 2), 100, now_s=1.1)
    prefill.forget((1, 2))
    assert prefill.queued_tokens == 500
    prefill.check()


def test_requests_are_the_larger_of_reported_and_planned() -> None:
    decode = worker("d0", ready(requests_running=1, requests_waiting=1))
    assert decode.request_count == 2
    for plan_id in range(5):
        decode.reserve((1, plan_id), 1)
    assert decode.request_count == 5


def test_the_prefill_rate_is_learnt_from_reports_of_a_busy_worker() -> None:
    prefill = worker("p0", ready(prefill_tokens_queued=4000))
    prefill.report(ready(prefill_tokens_queued=4000), 1.0, 0.1)
    prefill.report(ready(prefill_tokens_queued=1000), 2.0, 0.1)
    assert prefill.speed.tokens_per_s == pytest.approx(3000)
    prefill.report(ready(prefill_tokens_queued=500), 3.0, 0.1)
    assert prefill.speed.tokens_per_s == pytest.approx(1600, rel=0.05)


def test_prompts_that_came_between_two_reports_were_computed_too() -> None:
    prefill = worker("p0", ready(prefill_tokens_queued=1000))
    prefill.report(ready(prefill_tokens_queued=1000), 1.0, 0.1)
    prefill.assign_prefill((1, 1), 2000, now_s=1.5)
    prefill.report(ready(prefill_tokens_queued=1000), 2.0, 0.1)
    assert prefill.speed.tokens_per_s == pytest.approx(2000)


def test_a_worker_that_ran_dry_is_not_taken_for_slow() -> None:
    prefill = worker("p0", ready(prefill_tokens_queued=100))
    prefill.report(ready(prefill_tokens_queued=100), 1.0, 0.1)
    prefill.report(ready(prefill_tokens_queued=0), 2.0, 0.1)
    assert prefill.speed.tokens_per_s == 1000.0


def test_reports_in_quick_succession_are_one_rate_sample() -> None:
    prefill = worker("p0")
    prefill.report(ready(prefill_tokens_queued=4000), 1.0, 0.1)
    prefill.report(ready(prefill_tokens_queued=3990), 1.001, 0.1)
    assert prefill.speed.tokens_per_s == 1000.0
    prefill.report(ready(prefill_tokens_queued=3000), 1.5, 0.1)
    assert prefill.speed.tokens_per_s == pytest.approx(2000)


def test_the_cluster_knows_its_workers_by_id_and_role() -> None:
    cluster = ClusterState()
    for each in (worker("p0"), worker("d0"), worker("d1")):
        cluster.add(each)
    pool = cluster.pool_for_requests()
    assert [each.worker_id for each in pool.with_role("decode")] == ["d0", "d1"]
    for worker_id in ("p0", "d0", "d1"):
        cluster.remove(worker_id)
    assert cluster.pool_for_requests().with_role("decode") == []
    cluster.check()
