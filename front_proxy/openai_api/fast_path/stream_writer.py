"""The events of a streamed answer, byte for byte as vLLM's generators write them. Generates nothing.

vLLM makes and prints a pydantic object for each token. Here its generator is given a mark in place of a text first,
once for each choice. What it prints is the template of every chunk. It writes all else itself: the role, the end, the
usage and failures.
"""

from __future__ import annotations

import collections
import json.encoder
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput

from front_proxy.engine_client.texts import PromptFacts, TextDelta

DONE = "data: [DONE]\n\n"
"""The end of the last event."""
_MARK = f"text-{uuid.uuid4().hex}"
# JSON as pydantic prints it: nothing is escaped that need not be.
_quoted = json.encoder.encode_basestring


async def events(
    write: Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]],
    texts: AsyncGenerator[TextDelta, None],
    *,
    choices: int,
    with_roles: bool,
    silent: bool,
) -> AsyncGenerator[str, None]:
    """All events. The last piece has the last text, the usage and ``DONE``.

    ``write``: vLLM's generator over its outputs. ``with_roles``: it begins with an event for each choice. ``silent``:
    tokens without text make no event.
    """
    outputs = _Outputs()
    written = write(outputs)
    facts: PromptFacts | None = None
    templates: list[tuple[str, str]] = []
    tokens = [0] * choices
    unfinished = choices
    piece = ""
    try:
        async with aclosing(texts):
            async for delta in texts:
                index = delta.index
                if facts is None:
                    facts = delta.prompt
                    assert facts is not None, "the first delta has the prompt's facts"
                    outputs.put(_output(facts, *(_choice(index) for index in range(choices))))
                    piece = "".join([await anext(written) for _ in range(choices if with_roles else 0)])
                    templates = [_template(await anext(written)) for _ in range(choices)]
                tokens[index] += delta.tokens
                if delta.finish_reason is not None:
                    unfinished -= 1
                    outputs.put(_output(facts, _choice(index, delta, tokens[index])))
                    # vLLM writes nothing of a choice that was empty.
                    if unfinished and (delta.text or tokens[index]):
                        piece += await anext(written)
                elif delta.text or (tokens[index] and not silent):
                    before, behind = templates[index]
                    piece += before + _quoted(delta.text) + behind
                if piece and unfinished:
                    yield piece
                    piece = ""
        outputs.put(None)
    except Exception as error:  # noqa: BLE001 vLLM's generator tells it to the client
        outputs.put(error)
    yield piece + "".join([event async for event in written])


class _Outputs:
    """What vLLM's generator reads. It is asked for no more than was put."""

    def __init__(self) -> None:
        self._items: collections.deque[RequestOutput | Exception | None] = collections.deque()

    def put(self, item: RequestOutput | Exception | None) -> None:
        """One more output, or None or an error as the end."""
        self._items.append(item)

    def __aiter__(self) -> _Outputs:
        return self

    async def __anext__(self) -> RequestOutput:
        item = self._items.popleft()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item


class OfOnePrompt:
    """The same for completions, whose outputs come with the number of their prompt."""

    def __init__(self, outputs: AsyncIterator[RequestOutput]) -> None:
        self._outputs = outputs

    def __aiter__(self) -> OfOnePrompt:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        return 0, await anext(self._outputs)


def _template(event: str) -> tuple[str, str]:
    before, _, behind = event.partition(f'"{_MARK}"')
    return before, behind


def _choice(index: int, end: TextDelta | None = None, tokens: int = 0) -> CompletionOutput:
    """The end of a choice that had ``tokens``, or the mark."""
    return CompletionOutput(
        index=index,
        text=_MARK if end is None else end.text,
        # How many there are counts for the usage.
        token_ids=[0] * tokens,
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=None if end is None else end.finish_reason,
        stop_reason=None if end is None else end.stop_reason,
    )


def _output(prompt: PromptFacts, *choices: CompletionOutput) -> RequestOutput:
    return RequestOutput(
        request_id="",
        prompt=None,
        prompt_token_ids=prompt.token_ids,
        prompt_logprobs=None,
        outputs=list(choices),
        finished=False,
        num_cached_tokens=prompt.cached_tokens,
        num_cache_creation_tokens=prompt.created_cache_tokens,
    )
