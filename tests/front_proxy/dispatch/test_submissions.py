"""What a request asks of its workers."""

from __future__ import annotations

import pytest

from engine.protocol import EngineRequest
from front_proxy.dispatch import submissions, wire
from front_proxy.request.events import AskPlan, StartDecode, StartPrefill
from front_proxy.request.generation import GenerationRequest
from runtime.priority_class import engine_priority
from scheduler.api.actions import Placement
from worker.wire import request_of

WORKER = Placement("w0", "w0:1", 1)


@pytest.mark.parametrize(("named", "number"), [("", 0), ("batch", -3), ("interactive", 5), ("", 7)])
def test_workers_are_told_the_class_in_the_priority_and_the_scheduler_both_apart(named: str, number: int) -> None:
    whole = EngineRequest(request_id="r", token_ids=[1, 2], sampling=b"", priority=number)
    request = GenerationRequest(
        engine_request=whole, prefill_sampling=b"", continuation=None, output_tokens_max=5, priority_class=named
    )
    prefill = submissions.prefill(request, StartPrefill(attempt=1, worker=WORKER, whole=False), left_s=1.0)
    start = StartDecode(attempt=1, worker=WORKER, handoff=None, resume_token_ids=(), blocks_reserved=1)
    decode = submissions.decode(request, start, left_s=1.0)
    wanted = engine_priority(named, number)
    assert prefill.engine_request.priority == decode.engine_request.priority == wanted
    asked = submissions.question(1, request, AskPlan(attempt=1), left_s=1.0, ttft_left_s=0.0, block_size_tokens=0)
    assert (asked.priority, asked.priority_class) == (number, named)


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_a_worker_is_told_the_rank_of_the_plan_and_obeys_no_other_word(rank: int | None) -> None:
    whole = EngineRequest(request_id="r", token_ids=[1, 2], sampling=b"", rank=7)
    request = GenerationRequest(engine_request=whole, prefill_sampling=b"", continuation=None, output_tokens_max=5)
    there = Placement("w0", "w0:1", 1, 0, rank)
    prefill = submissions.prefill(request, StartPrefill(attempt=1, worker=there, whole=False), left_s=1.0)
    start = StartDecode(attempt=1, worker=there, handoff=None, resume_token_ids=(), blocks_reserved=1)
    for submission in (prefill, submissions.decode(request, start, left_s=1.0)):
        (told,) = wire.submit(1, submission, 0.0).messages
        heard = request_of(told.submit)
        assert heard is not None and heard.engine_request.rank == rank
