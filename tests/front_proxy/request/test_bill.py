"""What is billed is what the answer says; what it cost is what the workers say."""

from __future__ import annotations

import msgspec
import pytest

from accounts.usage import AttemptWork, work_of
from front_proxy.dispatch import wire
from front_proxy.request.bill import Bill
from front_proxy.request.work import Stage


def bill() -> Bill:
    return Bill(b"u" * 16, key_id="k1", team="a", model="demo", api="/v1/completions", wall_s=10.0)


def test_a_prompt_is_billed_once_for_several_outputs() -> None:
    one = bill()
    first, sibling = one.part(7), one.part(0)
    assert (first.number, sibling.number, sibling.prompt_tokens) == (0, 1, 0)
    one.begin(7, 2)
    one.output_tokens += 9
    one.ended |= {"stop", "length"}
    one.end()
    record = one.record(answered=True, failed=False, ttft_s=0.5, wall_s=11.0)
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (7, 2, 9)
    assert (record.outcome, record.began_s, record.ended_s) == ("length", 10.0, 11.0)


@pytest.mark.parametrize(
    ("begun", "ended", "answered", "failed", "outcome", "billed"),
    [
        (True, True, True, False, "finished", 12),
        (True, False, True, False, "cancelled", 12),
        (False, False, False, False, "cancelled", 0),
        (True, False, True, True, "failed", 12),
        (True, True, False, True, "failed", 0),
    ],
)
def test_nothing_is_billed_that_was_not_given(
    begun: bool, ended: bool, answered: bool, failed: bool, outcome: str, billed: int
) -> None:
    one = bill()
    one.part(7)
    if begun:
        one.begin(7, 0)
        one.output_tokens = 5
    if ended:
        one.end()
    record = one.record(answered=answered, failed=failed, ttft_s=0.0, wall_s=11.0)
    assert (record.outcome, record.prompt_tokens + record.output_tokens) == (outcome, billed)


def test_every_attempt_is_a_cost_and_one_that_says_nothing_is_estimated() -> None:
    one = bill()
    calls: list[str] = []
    one.on_told = lambda: calls.append("all")
    one.untold = 2
    work = AttemptWork(worker_id="prefill-0", stage="prefill", computed_tokens=7, prefill_us=70)
    one.told(msgspec.msgpack.encode(work))
    assert not calls
    one.told(wire.work_seen("decode-0", Stage.DECODE, 3))
    assert calls == ["all"]
    told = [work_of(each) for each in one.record(answered=False, failed=True, ttft_s=0.0, wall_s=11.0).told]
    assert told[0] == work
    assert [(each.worker_id, each.estimated) for each in told] == [("prefill-0", False), ("decode-0", True)]
