"""What vLLM's generators of events read: outputs that are put one by one. Writes no event."""

from __future__ import annotations

import collections
import json.encoder
import uuid
from collections.abc import AsyncIterator

from vllm.outputs import CompletionOutput, RequestOutput

from front_proxy.engine_client.texts import PromptFacts, TextDelta

MARK = f"text-{uuid.uuid4().hex}"
"""A text that is not found by chance."""
quoted = json.encoder.encode_basestring
"""JSON as pydantic prints it: nothing is escaped that need not be."""


class Outputs:
    """What vLLM's generator reads. It is asked for no more than was put."""

    def __init__(self) -> None:
        self._items: collections.deque[RequestOutput | Exception | None] = collections.deque()

    def put(self, item: RequestOutput | Exception | None) -> None:
        """One more output, or None or an error as the end."""
        self._items.append(item)

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> RequestOutput:
        item = self._items.popleft()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item


class OfOnePrompt:
    """Outputs for the generator of completions, which wants each with the number of its prompt: here always 0."""

    def __init__(self, outputs: AsyncIterator[RequestOutput]) -> None:
        self._outputs = outputs

    def __aiter__(self) -> OfOnePrompt:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        return 0, await anext(self._outputs)


def choice_of(index: int, end: TextDelta | None = None, tokens: int = 0) -> CompletionOutput:
    """The last output of a choice that had ``tokens``. Without ``end``: the output whose text is the mark."""
    return CompletionOutput(
        index=index,
        text=MARK if end is None else end.text,
        # How many there are counts for the usage.
        token_ids=[0] * tokens,
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=None if end is None else end.finish_reason,
        stop_reason=None if end is None else end.stop_reason,
    )


def output_of(prompt: PromptFacts, choices: list[CompletionOutput]) -> RequestOutput:
    """What choices of one prompt grew by."""
    return RequestOutput(
        request_id="",
        prompt=None,
        prompt_token_ids=prompt.token_ids,
        prompt_logprobs=None,
        outputs=choices,
        finished=False,
        num_cached_tokens=prompt.cached_tokens,
        num_cache_creation_tokens=prompt.created_cache_tokens,
    )
