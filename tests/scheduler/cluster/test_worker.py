"""What is counted of one worker."""

from __future__ import annotations

import pytest

from tests.scheduler.cast import ready, worker


def test_free_blocks_are_what_is_neither_reserved_nor_reported_as_used() -> None:
    decode = worker("d0")
    decode.reserve((1, 1), 30)
    assert decode.free_blocks == 70
    decode.report(ready(kv_blocks_used=45), 1.0, 0.1)
    assert decode.free_blocks == 55
    decode.reserve((1, 2), 20)
    assert decode.free_blocks == 50
    decode.forget((1, 1), 1.0)
    assert decode.free_blocks == 55
    decode.check()


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


def test_a_prompt_counts_as_a_request_until_a_report_can_include_it() -> None:
    prefill = worker("p0")
    prefill.assign_prompt((1, 1), 500, 0.5, now_s=1.0)
    assert prefill.request_count == 1
    prefill.report(ready(prefill_tokens_queued=500, requests_running=1), 1.1, 0.1)
    assert prefill.request_count == 1
    prefill.assign_prompt((1, 2), 100, 0.1, now_s=1.15)
    assert prefill.request_count == 2
    prefill.forget((1, 2), 1.15)
    assert prefill.request_count == 1
    assert prefill.prompt_wait_s(1.2) == pytest.approx(0.3)
    prefill.check()


def test_requests_are_the_larger_of_reported_and_planned() -> None:
    decode = worker("d0", ready(requests_running=1, requests_waiting=1))
    assert decode.request_count == 2
    for plan_id in range(5):
        decode.reserve((1, plan_id), 1)
    assert decode.request_count == 5
