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
    decode.forget((1, 1))
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


@pytest.mark.parametrize(
    ("reports", "tokens_per_s"),
    [
        ("0:4000 1:4000 2:1000", 3000),
        # The newer sample counts for more.
        ("0:4000 1:4000 2:1000 3:500", 1600),
        # Prompts that came between two reports were computed too.
        ("0:1000 1:1000 1.5+2000 2:1000", 2000),
        # A worker that ran dry is not taken for slow: until it is seen busy, 1000 is assumed.
        ("0:100 1:100 2:0", 1000),
        # Reports in quick succession are one sample.
        ("1:4000 1.001:3990", 1000),
        ("1:4000 1.001:3990 1.5:3000", 2000),
    ],
)
def test_how_fast_it_computes_is_learnt_from_reports(reports: str, tokens_per_s: float) -> None:
    """``2:1000``: at 2 s it reports 1000 tokens in its queue. ``2+1000``: a prompt of so many is sent there."""
    prefill = worker("p0")
    for word in reports.split():
        at_s, tokens = map(float, word.replace("+", ":").split(":"))
        if "+" in word:
            prefill.assign_prefill((1, 1), int(tokens), at_s)
        else:
            prefill.report(ready(prefill_tokens_queued=int(tokens)), at_s, 0.1)
    assert prefill.speed.tokens_per_s == pytest.approx(tokens_per_s, rel=0.05)
