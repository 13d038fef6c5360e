"""Deltas of remote engines as the outputs vLLM's OutputProcessor takes. Never detokenises."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from engine.protocol import Logprobs
from front_proxy.request.generation import GenerationDelta

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "error": FinishReason.ERROR,
}


def core_output(request_id: str, delta: GenerationDelta, stats: PrefillStats | None) -> EngineCoreOutput:
    """What an engine core in this process would have said."""
    finish = delta.finish
    return EngineCoreOutput(
        request_id=request_id,
        # The processor cuts what lies behind a stop string out of this list.
        new_token_ids=list(delta.token_ids),
        new_logprobs=None if delta.logprobs is None else _lists(delta.logprobs),
        new_prompt_logprobs_tensors=None if delta.prompt_logprobs is None else _tensors(delta.prompt_logprobs),
        finish_reason=None if finish is None else _FINISH[finish.reason],
        stop_reason=None if finish is None else finish.stop_token_id,
        prefill_stats=stats,
    )


def prefill_stats(prompt_tokens: int, cached_tokens: int, block_size_tokens: int) -> PrefillStats:
    """Usage facts of the side that computed the prompt; its full blocks are what it left in its cache."""
    full_blocks_tokens = prompt_tokens // block_size_tokens * block_size_tokens
    return PrefillStats(
        num_prompt_tokens=prompt_tokens,
        num_computed_tokens=prompt_tokens - cached_tokens,
        num_cached_tokens=cached_tokens,
        num_local_cached_tokens=cached_tokens,
        num_cache_creation_tokens=max(0, full_blocks_tokens - cached_tokens),
    )


def _lists(logprobs: Logprobs) -> LogprobsLists:
    shape = (len(logprobs.ranks), logprobs.width)
    return LogprobsLists(
        np.array(logprobs.token_ids, dtype=np.int32).reshape(shape),
        np.array(logprobs.logprobs, dtype=np.float32).reshape(shape),
        np.array(logprobs.ranks, dtype=np.int32),
    )


def _tensors(logprobs: Logprobs) -> LogprobsTensors:
    shape = (len(logprobs.ranks), logprobs.width)
    return LogprobsTensors(
        torch.tensor(logprobs.token_ids, dtype=torch.int32).reshape(shape),
        torch.tensor(logprobs.logprobs, dtype=torch.float32).reshape(shape),
        torch.tensor(logprobs.ranks, dtype=torch.int32),
    )
