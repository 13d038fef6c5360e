"""An open-loop client: sends each prompt when it is due, however the cluster is doing, and notes when tokens come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from bench.measures import RequestRecord
from front_proxy.grpc_api.client import BatonClient, BatonError, GenerateRequest, Result, SamplingOptions, request

# After the last one is due.
DRAIN_TIMEOUT_S = 120.0


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One request, due so long after the beginning."""

    due_s: float
    token_ids: Sequence[int]
    output_tokens: int
    tenant: str = ""
    # What it asks for; 0: nothing.
    ttft_slo_ms: float = 0.0
    tpot_slo_ms: float = 0.0


async def run(address: str, model: str, prompts: Sequence[Prompt], *, alone: bool = False) -> list[RequestRecord]:
    """Send all over one stream of Baton's gRPC API. The records are in the order of the prompts.

    ``alone``: one after the other, each on an idle cluster, and not when they are due.
    """
    records = [RequestRecord(due_s=prompt.due_s, sent_s=prompt.due_s) for prompt in prompts]
    messages = [_message(str(index), model, prompt) for index, prompt in enumerate(prompts)]
    turn = asyncio.Semaphore(1 if alone else len(prompts))
    began_s = time.perf_counter()

    async def outgoing() -> AsyncIterator[GenerateRequest]:
        for record, message in zip(records, messages, strict=True):
            await turn.acquire()
            if not alone:
                await asyncio.sleep(max(0.0, began_s + record.due_s - time.perf_counter()))
            record.sent_s = time.perf_counter() - began_s
            yield message

    left = len(prompts)
    async with BatonClient(address) as client, asyncio.timeout(prompts[-1].due_s + DRAIN_TIMEOUT_S):
        async for result in client.generate_many(outgoing(), in_flight_max=len(prompts)):
            _take(result, records[int(result.request_id)], time.perf_counter() - began_s)
            left -= result.finished
            if result.finished:
                turn.release()
            if not left:
                break
    return records


def _message(request_id: str, model: str, prompt: Prompt) -> GenerateRequest:
    sampling = SamplingOptions(max_tokens=prompt.output_tokens, temperature=0.0, ignore_eos=True)
    return request(
        prompt.token_ids,
        sampling,
        request_id=request_id,
        model=model,
        return_text=False,
        tenant=prompt.tenant,
        ttft_slo_ms=prompt.ttft_slo_ms,
        tpot_slo_ms=prompt.tpot_slo_ms,
    )


def _take(result: Result, record: RequestRecord, now_s: float) -> None:
    error: BatonError | None = result.error
    if error is not None:
        record.error = f"{error.reason}: {error}"
    elif (response := result.response) is not None:
        if any(choice.token_ids for choice in response.choices):
            record.chunk_times_s.append(now_s)
        if result.finished:
            record.prompt_tokens = response.usage.prompt_tokens
            record.output_tokens = response.usage.completion_tokens
    if result.finished:
        record.end_s = now_s
