"""The events of a streamed answer, byte for byte as vLLM's generators write them. Generates nothing.

vLLM makes and prints a pydantic object for each token. Here vLLM's generator first gets an output of each choice whose
text is a mark. What it prints is the template of that choice's chunks: the text takes the mark's place. If it prints
the usage so far in each chunk, the counts are replaced too. The generator still writes the role, the end, the last
usage and failures.
"""

from __future__ import annotations

import collections
import json.encoder
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput

from front_proxy.engine_client.texts import PromptFacts, TextDelta

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""
_MARK = f"text-{uuid.uuid4().hex}"
# What grows in the usage of each chunk. No text has these quotes, which JSON would escape.
_COUNT = re.compile(r'"(completion|total)_tokens":\d+')
# JSON as pydantic prints it: nothing is escaped that need not be.
_quoted = json.encoder.encode_basestring


async def events(writer: StreamWriter, texts: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[str, None]:
    """All events. The last piece has the last text, the usage and ``DONE``."""
    piece = ""
    async with aclosing(texts), aclosing(writer.written):
        try:
            async for delta in texts:
                piece = await writer.piece(delta)
                if piece and not writer.whole:
                    yield piece
                    piece = ""
        except Exception as error:  # noqa: BLE001 vLLM's generator tells it to the client
            yield piece + await writer.end(error)
        else:
            yield piece + await writer.end()


class StreamWriter:
    """Writes one answer."""

    def __init__(
        self,
        write: Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]],
        *,
        choices: int,
        with_roles: bool,
        silent: bool,
    ) -> None:
        """``write``: vLLM's generator over its outputs. ``with_roles``: it begins with an event for each choice.

        ``silent``: tokens without text make no event.
        """
        self._outputs = _Outputs()
        self.written = write(self._outputs)
        self._unfinished = choices
        self._with_roles = with_roles
        self._silent = silent
        self._prompt: PromptFacts | None = None
        self._templates: list[tuple[str, str]] = []
        self._with_usage = False
        self._tokens = [0] * choices

    @property
    def whole(self) -> bool:
        """Every choice has ended."""
        return self._unfinished == 0

    async def piece(self, delta: TextDelta) -> str:
        """The events of one delta, possibly none. Those of the answer's last delta are left for ``end``."""
        before = "" if self._templates else await self._begin(delta)
        index, text = delta.index, delta.text
        self._tokens[index] += delta.tokens
        there = bool(text or self._tokens[index])
        if delta.finish_reason is None:
            if not text and (self._silent or not there):
                return before
            head, tail = self._templates[index]
            if self._with_usage:
                assert self._prompt is not None
                tokens = self._tokens[index]
                tail %= {"completion": tokens, "total": len(self._prompt.token_ids) + tokens}
            return before + head + _quoted(text) + tail
        self._unfinished -= 1
        assert self._prompt is not None
        self._outputs.put(_output(self._prompt, [_choice(index, delta, self._tokens[index])]))
        # vLLM's generator writes nothing of a choice that was empty.
        return before if self.whole or not there else before + await anext(self.written)

    async def end(self, error: Exception | None = None) -> str:
        """What vLLM's generator has still to write: the last delta and the usage, or the error; and ``DONE``."""
        self._outputs.put(error)
        return "".join([event async for event in self.written])

    async def _begin(self, first: TextDelta) -> str:
        assert first.prompt is not None, "the first delta has the prompt's facts"
        self._prompt = first.prompt
        choices = range(len(self._tokens))
        self._outputs.put(_output(self._prompt, [_choice(index) for index in choices]))
        roles = [await anext(self.written) for _ in choices if self._with_roles]
        self._templates = [_template(await anext(self.written)) for _ in choices]
        self._with_usage = bool(_COUNT.search(self._templates[0][1]))
        if self._with_usage:
            self._templates = [(head, _with_counts(tail)) for head, tail in self._templates]
        return "".join(roles)


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
    """Outputs for the generator of completions, which wants each with the number of its prompt: here always 0."""

    def __init__(self, outputs: AsyncIterator[RequestOutput]) -> None:
        self._outputs = outputs

    def __aiter__(self) -> OfOnePrompt:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        return 0, await anext(self._outputs)


def _template(event: str) -> tuple[str, str]:
    before, mark, behind = event.partition(f'"{_MARK}"')
    if not mark:
        raise ValueError("vLLM's generator did not write the text as it was")
    return before, behind


def _with_counts(tail: str) -> str:
    """The format of a chunk's end that has its choice's usage so far."""
    return _COUNT.sub(r'"\1_tokens":%(\1)d', tail.replace("%", "%%"))


def _choice(index: int, end: TextDelta | None = None, tokens: int = 0) -> CompletionOutput:
    """The last output of a choice that had ``tokens``. Without ``end``: the output whose text is the mark."""
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


def _output(prompt: PromptFacts, choices: list[CompletionOutput]) -> RequestOutput:
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
