"""What a request asks of the scheduler and of its workers, from what its machine decided. Pure; sends nothing."""

from __future__ import annotations

from engine.protocol import EngineRequest
from front_proxy.request.events import AskPlan, StartDecode, StartPrefill
from front_proxy.request.generation import Continuation, GenerationRequest
from front_proxy.request.work import Stage, Submission
from kv_transfer.handoff.handoff import KvHandoff
from scheduler.api.events import PlanRequested


def question(plan_id: int, request: GenerationRequest, ask: AskPlan, *, left_s: float) -> PlanRequested:
    """Where may it run? ``left_s`` is what is left of its deadline, in all three functions."""
    return PlanRequested(
        session=0,
        plan_id=plan_id,
        request_id=request.request_id,
        prompt_tokens=len(request.token_ids) + ask.resume_tokens,
        output_tokens_max=request.output_tokens_max - ask.resume_tokens,
        priority=request.priority,
        excluded_worker_ids=frozenset(ask.excluded_worker_ids),
        pinned_decode_worker_id=ask.pinned_decode_worker,
        tenant=request.tenant,
        priority_class=request.priority_class,
        wait_max_s=left_s,
        prefill_only=ask.prefill_only,
        resumed=ask.resumed,
    )


def prefill(request: GenerationRequest, start: StartPrefill, *, left_s: float) -> Submission:
    """Prompt and delivered tokens, and one token more."""
    sampling = request.decode_sampling if start.whole else request.prefill_sampling
    if start.resume_token_ids:
        sampling = _continuation(request).first(len(start.resume_token_ids))
    return _submission(request, start, Stage.PREFILL, sampling, left_s=left_s)


def decode(request: GenerationRequest, start: StartDecode, *, left_s: float) -> Submission:
    """Prompt and delivered tokens, and all that is left."""
    sampling = request.decode_sampling
    if start.resume_token_ids:
        sampling = _continuation(request).rest(len(start.resume_token_ids))
    return _submission(
        request,
        start,
        Stage.DECODE,
        sampling,
        left_s=left_s,
        handoff=start.handoff,
        blocks_reserved=start.blocks_reserved,
    )


def _continuation(request: GenerationRequest) -> Continuation:
    assert request.continuation is not None, "tokens are given to an engine that cannot go on from them"
    return request.continuation


def _submission(
    request: GenerationRequest,
    start: StartPrefill | StartDecode,
    stage: Stage,
    sampling: bytes,
    *,
    left_s: float,
    handoff: KvHandoff | None = None,
    blocks_reserved: int = 0,
) -> Submission:
    engine_request = EngineRequest(
        request_id=f"{request.request_id}-{stage.value[0]}{start.attempt}",
        token_ids=[*request.token_ids, *start.resume_token_ids] if start.resume_token_ids else request.token_ids,
        sampling=sampling,
        priority=request.priority,
        cache_salt=request.cache_salt,
        session_id=request.session_id,
        trace_headers=request.trace_headers,
        reasoning_ended=request.reasoning_ended,
        reasoning_parser_kwargs=request.reasoning_parser_kwargs,
    )
    return Submission(
        stage=stage,
        request=engine_request,
        handoff=handoff,
        blocks_reserved=blocks_reserved,
        deadline_s=left_s,
    )
