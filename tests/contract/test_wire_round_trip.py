"""What one process puts on the wire, the other takes off: the converters of front proxy and worker, as pairs."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import EngineOutput, EngineRequest, Finish, FirstOutput, Logprobs
from front_proxy.dispatch import wire as front_wire
from front_proxy.request.work import Stage, Submission
from kv_transfer.handoff.handoff import KvHandoff
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import Failure, FailureKind
from worker import wire as worker_wire

UINT32 = st.integers(0, 2**32 - 1)
TOKENS = st.lists(UINT32, max_size=5)
TEXT = st.text(max_size=8)
NAME = st.none() | st.text(min_size=1, max_size=8)
# What the wire holds exactly: whole microseconds, whole milliseconds, single-precision numbers.
SECONDS = st.integers(0, 10**9).map(lambda us: us / 1e6)
LOGPROBS = st.builds(
    Logprobs,
    width=UINT32,
    token_ids=TOKENS,
    logprobs=st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    ranks=TOKENS,
)
HANDOFFS = st.builds(
    KvHandoff,
    worker_id=TEXT,
    epoch=st.integers(0, 2**63),
    lease_id=TEXT,
    engine_id=TEXT,
    tokens=UINT32,
    blocks=UINT32,
    bytes=st.integers(0, 2**63),
    layout_fingerprint=TEXT,
    lease_remaining_s=st.integers(0, 10**6).map(lambda ms: ms / 1000),
    connector_params=st.binary(max_size=8),
    prompt_digest=st.binary(max_size=8),
)
ENGINE_REQUESTS: dict[str, st.SearchStrategy[Any]] = {
    "request_id": TEXT,
    "token_ids": TOKENS,
    "sampling": st.binary(max_size=8),
    "priority": st.integers(-(2**31), 2**31 - 1),
    "cache_salt": NAME,
    "session_id": NAME,
    "trace_headers": st.none() | st.dictionaries(TEXT, TEXT, min_size=1, max_size=2),
    "reasoning_ended": st.none() | st.booleans(),
    "reasoning_parser_kwargs": st.binary(max_size=8),
}


@given(
    asked=st.fixed_dictionaries(ENGINE_REQUESTS),
    slot=UINT32,
    handoff=st.none() | HANDOFFS,
    stage=st.sampled_from(Stage),
    deadline_ms=st.integers(0, 10**6),
    blocks_reserved=UINT32,
)
def test_a_submission_arrives_as_it_was_sent(
    asked: dict[str, Any],
    slot: int,
    handoff: KvHandoff | None,
    stage: Stage,
    deadline_ms: int,
    blocks_reserved: int,
) -> None:
    submission = Submission(
        engine_request=EngineRequest(**asked),
        stage=stage,
        handoff=handoff,
        deadline_s=deadline_ms / 1000,
        blocks_reserved=blocks_reserved,
    )
    sent = front_wire.submit(slot, submission, 0.0).SerializeToString()
    request = worker_wire.request_of(pb.AttachRequests.FromString(sent).messages[0].submit)
    assert request is not None
    assert request.engine_request == submission.engine_request
    assert (request.slot, request.blocks_reserved) == (slot, blocks_reserved)
    work = ("prefill", None) if stage is Stage.PREFILL else ("decode", handoff)
    assert (request.role, request.handoff) == work
    # Whole milliseconds, and never 0, which would mean that there is no deadline.
    assert abs((request.deadline_s or 0.0) - deadline_ms / 1000) <= 0.001


@given(
    token_ids=TOKENS,
    finish=st.none()
    | st.builds(Finish, reason=st.sampled_from(["stop", "length", "abort", "error"]), stop_token_id=st.none() | UINT32),
    first=st.none()
    | st.builds(FirstOutput, cached_tokens=UINT32, external_tokens=UINT32, queue_s=SECONDS, compute_s=SECONDS),
    logprobs=st.none() | LOGPROBS,
    prompt_logprobs=st.none() | LOGPROBS,
    handoff=st.none() | HANDOFFS,
    admission_s=SECONDS,
)
def test_an_output_arrives_as_it_was_sent(admission_s: float, handoff: KvHandoff | None, **fields: Any) -> None:
    output = EngineOutput(**fields)
    sent = worker_wire.delta_of(7, output, handoff, admission_s).SerializeToString()
    told = front_wire.worker_output(pb.Delta.FromString(sent))
    assert (told.token_ids, told.finish, told.handoff) == (output.token_ids, output.finish, handoff)
    assert (told.logprobs, told.prompt_logprobs) == (output.logprobs, output.prompt_logprobs)
    assert (told.first, told.admission_s) == (output.first, admission_s if output.first else 0.0)


@given(kind=st.sampled_from(FailureKind), message=TEXT, retry_after_ms=st.none() | st.integers(1, 10**6))
def test_a_failure_arrives_as_it_was_sent(kind: FailureKind, message: str, retry_after_ms: int | None) -> None:
    failure = Failure(kind=kind, message=message, retry_after_s=retry_after_ms and retry_after_ms / 1000)
    sent = pb.Delta.FromString(worker_wire.failure_of(7, failure).SerializeToString()).failure
    told = front_wire.failure(sent.kind, sent.message, sent.retry_after_ms)
    assert (told.kind, told.message) == (kind, message)
    assert abs((told.retry_after_s or 0.0) - (failure.retry_after_s or 0.0)) <= 0.001
