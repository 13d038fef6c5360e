"""What one process encodes is what the other decodes. For workers: tests/contract/test_wire_round_trip.py."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.usage import records_of, work_of
from front_proxy.dispatch import wire
from front_proxy.request.bill import Bill
from front_proxy.request.events import Measured
from front_proxy.request.work import Stage
from protos.scheduler.v1 import scheduler_pb2
from runtime.failures import Failure, FailureKind
from scheduler import wire as scheduler_wire
from scheduler.api.actions import Placement, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested, RequestEnded, RunningPlan

# What a message can carry: whole milliseconds, and a number that means "unset" is never drawn.
INTS = st.integers(1, 2**31 - 1)
# Eighths of a second: a float that is whole milliseconds and no more.
MS = st.integers(1, 2**24).map(lambda eighths: eighths / 8)
US = st.integers(1, 2**31 - 1).map(lambda us: us / 1e6)
NAMES = st.text(min_size=1, max_size=6)
PLACEMENTS = st.none() | st.builds(Placement, NAMES, NAMES, INTS, INTS, st.none() | st.integers(0, 71))
QUESTIONS = st.builds(
    PlanRequested, session=st.just(0), plan_id=INTS, request_id=NAMES, prompt_tokens=INTS, output_tokens_max=INTS,
    priority=st.integers(-(2**31), 2**31 - 1), excluded_worker_ids=st.frozensets(NAMES, max_size=3),
    pinned_decode_worker_id=st.none() | NAMES, tenant=NAMES, priority_class=NAMES, wait_max_s=MS,
    prefill_only=st.booleans(), resumed=st.booleans(), ttft_slo_s=st.just(0.0) | MS, itl_slo_s=st.just(0.0) | US,
    block_keys=st.integers(0, 3).map(lambda keys: b"a-packed" * keys),
)  # fmt: skip
PLANS = st.builds(
    ReplyPlan, session=st.just(0), plan_id=INTS, prefill=PLACEMENTS, decode=PLACEMENTS, decode_blocks_reserved=INTS,
    reason=NAMES,
)  # fmt: skip
RUNNING = st.builds(
    RunningPlan, plan_id=INTS, request_id=NAMES, prefill=PLACEMENTS, decode=PLACEMENTS, decode_blocks=INTS
)
MEASURED = st.builds(Measured, ttft_s=US, itl_s=US, cached_tokens=INTS, finish=NAMES)
FAILURES = st.builds(Failure, kind=st.sampled_from(FailureKind), message=NAMES, retry_after_s=st.none() | MS)


def only(told: Any) -> Any:
    """The one message of a list."""
    (message,) = told.messages
    return message


@given(QUESTIONS, st.lists(RUNNING, max_size=3))
def test_what_a_front_proxy_tells_the_scheduler_arrives(question: PlanRequested, running: list[RunningPlan]) -> None:
    assert scheduler_wire.plan_requested(0, only(wire.plan_request(question)).plan) == question
    told = only(wire.plans_running(running, asked=[1, 2], complete=True)).running
    assert scheduler_wire.plans_running(0, told).plans == tuple(running)


@given(INTS, INTS, st.none() | MEASURED)
def test_what_a_front_proxy_tells_of_a_plans_end_arrives(plan_id: int, tokens: int, measured: Measured | None) -> None:
    told = only(wire.request_ended(plan_id, "finished", tokens, measured)).ended
    facts = msgspec.structs.asdict(measured) if measured is not None else {}
    expected = RequestEnded(session=3, plan_id=plan_id, outcome="finished", output_tokens=tokens, **facts)
    assert scheduler_wire.request_ended(3, told) == expected


@pytest.mark.parametrize(
    "told",
    [
        b"\x05",
        b"\xc1",
        msgspec.msgpack.encode(["w", "decode", -1]),
        msgspec.msgpack.encode(["w", "decode", 1 << 63]),
    ],
)
def test_what_a_worker_tells_of_its_work_spoils_no_record(told: bytes) -> None:
    bill = Bill(b"u" * 16, key_id="k", team="t", model="m", api="", wall_s=0.0)
    bill.told(told)
    bill.told(wire.work_seen("decode-0", Stage.DECODE, 3))
    record = bill.record(answered=False, failed=True, ttft_s=0.0, wall_s=1.0)
    records, unread = records_of(msgspec.msgpack.encode([record, record]))
    assert len(records) == 2 and not unread
    works = [work_of(each) for each in records[0].told]
    assert [(each.worker_id, each.estimated) for each in works] == [("", True), ("decode-0", True)]


@pytest.mark.parametrize(("prompt", "output"), [(-1, 1), (1, -1), (1, 1 << 32)])
def test_no_hold_is_asked_for_what_cannot_be(prompt: int, output: int) -> None:
    asked = msgspec.msgpack.encode([b"u", 0, "k", "t", "m", "default", prompt, output])
    with pytest.raises(ValueError, match="Expected `int`"):
        scheduler_wire.plan_requested(0, scheduler_pb2.PlanRequest(hold=asked))


def test_no_time_is_too_short_or_too_long_to_be_told() -> None:
    question = PlanRequested(
        session=0, plan_id=1, request_id="r", prompt_tokens=1, output_tokens_max=1, ttft_slo_s=1e-9, itl_slo_s=1e-9
    )
    asked = only(wire.plan_request(question)).plan
    assert (asked.ttft_slo_ms, asked.itl_slo_us) == (1, 1), "0 would be none"
    ended = only(wire.request_ended(1, "finished", 1, Measured(ttft_s=1e6, itl_s=1e6))).ended
    assert ended.ttft_us == ended.itl_us == 2**32 - 1


@given(PLANS, FAILURES, MS)
def test_what_the_scheduler_answers_arrives(plan: ReplyPlan, failure: Failure, wait_max_s: float) -> None:
    assert word(scheduler_wire.plan(plan)) == plan
    refusal = ReplyRefusal(session=0, plan_id=1, failure=failure, cause="")
    arrived = word(scheduler_wire.refusal(refusal))
    # Whether the worker was reached is said by the front proxy's own stream, not by the scheduler.
    assert arrived == refusal
    waiting = ReplyWaiting(session=0, plan_id=1, wait_max_s=wait_max_s)
    assert word(scheduler_wire.waiting(waiting)) == waiting


def word(told: scheduler_pb2.FrontReplies) -> object:
    reply = only(told)
    return wire.word(reply.WhichOneof("message"), reply)


def test_a_failure_of_an_unknown_kind_is_internal() -> None:
    assert wire.failure("from the future", "?", 0) == Failure(kind=FailureKind.INTERNAL, message="?")
