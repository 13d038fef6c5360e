"""What a request asks of the scheduler and of its workers, from what its machine decided. Pure; sends nothing."""

from __future__ import annotations

import msgspec

from front_proxy.request.events import AskPlan, StartDecode, StartPrefill
from front_proxy.request.generation import Continuation, GenerationRequest
from front_proxy.request.work import Stage, Submission
from runtime.priority_class import engine_priority
from scheduler.api.events import PlanRequested


def question(
    plan_id: int,
    request: GenerationRequest,
    ask: AskPlan,
    *,
    left_s: float,
    ttft_left_s: float,
    block_size_tokens: int,
) -> PlanRequested:
    """Where may it run? ``left_s`` is what is left of its deadline, in all three functions.

    ``ttft_left_s``: of the time to the first token that it asks for. 0: none is asked for, or the client has the token.
    ``block_size_tokens``: of all workers. 0: not known.
    """
    keys, shown = request.prompt_keys, ask.resume_token_ids
    return PlanRequested(
        session=0,
        plan_id=plan_id,
        request_id=request.request_id,
        prompt_tokens=len(request.engine_request.token_ids) + len(shown),
        output_tokens_max=request.output_tokens_max - len(shown),
        priority=request.engine_request.priority,
        excluded_worker_ids=frozenset(ask.excluded_worker_ids),
        pinned_decode_worker_id=ask.pinned_decode_worker,
        tenant=request.tenant,
        priority_class=request.priority_class,
        wait_max_s=left_s,
        prefill_only=ask.prefill_only,
        resumed=ask.resumed,
        ttft_slo_s=ttft_left_s,
        itl_slo_s=request.itl_slo_s,
        hold=None if request.account is None else request.account.asks(),
        block_keys=b"" if keys is None else keys.packed(block_size_tokens, shown),
    )


def prefill(request: GenerationRequest, start: StartPrefill, *, left_s: float) -> Submission:
    """Prompt and delivered tokens, and one token more."""
    sampling = request.engine_request.sampling if start.whole else request.prefill_sampling
    if start.resume_token_ids:
        sampling = _continuation(request).first(len(start.resume_token_ids))
    return _submission(request, start, Stage.PREFILL, sampling, left_s)


def decode(request: GenerationRequest, start: StartDecode, *, left_s: float) -> Submission:
    """Prompt and delivered tokens, and all that is left."""
    sampling = request.engine_request.sampling
    if start.resume_token_ids:
        sampling = _continuation(request).rest(len(start.resume_token_ids))
    submission = _submission(request, start, Stage.DECODE, sampling, left_s)
    return msgspec.structs.replace(submission, handoff=start.handoff, blocks_reserved=start.blocks_reserved)


def _continuation(request: GenerationRequest) -> Continuation:
    assert request.continuation is not None, "tokens are given to an engine that cannot go on from them"
    return request.continuation


def _submission(
    request: GenerationRequest, start: StartPrefill | StartDecode, stage: Stage, sampling: bytes, left_s: float
) -> Submission:
    whole = request.engine_request
    engine_request = msgspec.structs.replace(
        whole,
        request_id=f"{whole.request_id}-{stage.value[0]}{start.attempt}",
        token_ids=[*whole.token_ids, *start.resume_token_ids] if start.resume_token_ids else whole.token_ids,
        sampling=sampling,
        priority=engine_priority(request.priority_class, whole.priority),
        rank=start.worker.rank,
    )
    return Submission(
        stage=stage, engine_request=engine_request, deadline_s=left_s, tell_work=request.account is not None
    )
