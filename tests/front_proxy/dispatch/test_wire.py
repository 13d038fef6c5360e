"""What one process encodes is what the other decodes: front proxy to scheduler and to worker, and back."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import EngineOutput, EngineRequest, Finish, FirstOutput, Logprobs
from front_proxy.dispatch import wire
from front_proxy.request.work import Stage, Submission
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure, FailureKind
from scheduler import wire as scheduler_wire
from scheduler.api.actions import Placement, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested, RunningPlan
from worker import wire as worker_wire

# What a message can carry: whole milliseconds and microseconds, and a number that means "unset" is never drawn.
INTS = st.integers(1, 2**31 - 1)
MS = st.integers(1, 2**31 - 1).map(lambda ms: ms / 1000)
US = st.integers(0, 2**31 - 1).map(lambda us: us / 1e6)
NAMES, BYTES, TOKENS = st.text(min_size=1, max_size=6), st.binary(max_size=6), st.lists(INTS, max_size=4)
PLACEMENTS = st.none() | st.builds(Placement, NAMES, NAMES, INTS)
HANDOFFS = st.builds(
    KvHandoff, worker_id=NAMES, epoch=INTS, lease_id=NAMES, engine_id=NAMES, tokens=INTS, blocks=INTS, bytes=INTS,
    layout_fingerprint=NAMES, lease_remaining_s=MS, connector_params=BYTES, prompt_digest=BYTES,
)  # fmt: skip
QUESTIONS = st.builds(
    PlanRequested, session=st.just(0), plan_id=INTS, request_id=NAMES, prompt_tokens=INTS, output_tokens_max=INTS,
    priority=st.integers(-(2**31), 2**31 - 1), excluded_worker_ids=st.frozensets(NAMES, max_size=3),
    pinned_decode_worker_id=st.none() | NAMES, tenant=NAMES, priority_class=NAMES, wait_max_s=MS,
    prefill_only=st.booleans(), resumed=st.booleans(),
)  # fmt: skip
PLANS = st.builds(
    ReplyPlan, session=st.just(0), plan_id=INTS, prefill=PLACEMENTS, decode=PLACEMENTS, decode_blocks_reserved=INTS,
    reason=NAMES,
)  # fmt: skip
RUNNING = st.builds(
    RunningPlan, plan_id=INTS, request_id=NAMES, prefill=PLACEMENTS, decode=PLACEMENTS, decode_blocks=INTS
)
FAILURES = st.builds(Failure, kind=st.sampled_from(FailureKind), message=NAMES, retry_after_s=st.none() | MS)
REQUESTS = st.builds(
    EngineRequest, request_id=NAMES, token_ids=TOKENS, sampling=BYTES, priority=st.integers(-(2**31), 2**31 - 1),
    cache_salt=st.none() | NAMES, session_id=st.none() | NAMES, reasoning_ended=st.none() | st.booleans(),
    trace_headers=st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=2), reasoning_parser_kwargs=BYTES,
)  # fmt: skip
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=4)
TABLES = st.none() | st.builds(Logprobs, width=INTS, token_ids=TOKENS, logprobs=FLOATS, ranks=TOKENS)
FINISHES = st.builds(Finish, st.sampled_from(["stop", "length", "abort", "error"]), st.none() | INTS)
FIRSTS = st.builds(FirstOutput, cached_tokens=INTS, external_tokens=INTS, queue_s=US, compute_s=US)


def only(told: Any) -> Any:
    """The one message of a list."""
    (message,) = told.messages
    return message


@given(QUESTIONS, st.lists(RUNNING, max_size=3))
def test_what_a_front_proxy_tells_the_scheduler_arrives(question: PlanRequested, running: list[RunningPlan]) -> None:
    assert scheduler_wire.plan_requested(0, only(wire.plan_request(question)).plan) == question
    told = only(wire.plans_running(running, asked=[1, 2], complete=True)).running
    assert scheduler_wire.plans_running(0, told).plans == tuple(running)


@given(PLANS, FAILURES, MS)
def test_what_the_scheduler_answers_arrives(plan: ReplyPlan, failure: Failure, wait_max_s: float) -> None:
    assert wire.word(only(scheduler_wire.plan(plan))) == plan
    refusal = ReplyRefusal(session=0, plan_id=1, failure=failure, cause="")
    arrived = wire.word(only(scheduler_wire.refusal(refusal)))
    # Whether the worker was reached is said by the front proxy's own stream, not by the scheduler.
    assert arrived == refusal
    waiting = ReplyWaiting(session=0, plan_id=1, wait_max_s=wait_max_s)
    assert wire.word(only(scheduler_wire.waiting(waiting))) == waiting


@given(REQUESTS, st.none() | HANDOFFS, st.sampled_from(Stage), MS)
def test_a_submission_arrives(
    request: EngineRequest, handoff: KvHandoff | None, stage: Stage, deadline_s: float
) -> None:
    sent = Submission(stage=stage, engine_request=request, handoff=handoff, blocks_reserved=3, deadline_s=deadline_s)
    arrived = worker_wire.request_of(only(wire.submit(7, sent, 0.0)).submit)
    assert arrived is not None and arrived.engine_request == request
    assert (arrived.slot, arrived.blocks_reserved, type(arrived.work).__name__) == (7, 3, stage.value.title())
    assert arrived.deadline_s is not None and abs(arrived.deadline_s - deadline_s) < 0.0011
    if stage is Stage.DECODE:
        assert getattr(arrived.work, "handoff", None) == handoff


@given(TOKENS, st.none() | FINISHES, st.none() | FIRSTS, TABLES, st.none() | HANDOFFS, US)
def test_an_output_arrives(
    token_ids: list[int],
    finish: Finish | None,
    first: FirstOutput | None,
    table: Logprobs | None,
    handoff: KvHandoff | None,
    admission_s: float,
) -> None:
    output = EngineOutput(token_ids=token_ids, finish=finish, first=first, logprobs=table, prompt_logprobs=table)
    arrived = wire.worker_output(worker_wire.delta_of(1, output, handoff, admission_s))
    assert (arrived.finish, arrived.first, arrived.handoff) == (finish, first, handoff)
    assert (list(arrived.token_ids), arrived.admission_s) == (token_ids, admission_s if first else 0.0)
    assert msgspec.to_builtins(arrived.logprobs) == msgspec.to_builtins(arrived.prompt_logprobs)
    assert arrived.logprobs == table


def test_a_failure_of_an_unknown_kind_is_internal() -> None:
    assert wire.failure("from the future", "?", 0) == Failure(kind=FailureKind.INTERNAL, message="?")
