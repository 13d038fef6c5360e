"""The events of a streamed answer, byte for byte as vLLM's generators write them. Generates nothing.

vLLM makes and prints a pydantic object for each token. Here vLLM's generator first gets an output of each choice whose
text is a mark. What it prints is the template of that choice's chunks: the text takes the mark's place. If it prints
the usage so far in each chunk, the counts are replaced too. The generator still writes the role, the end, the last
usage and failures; where a stream's form is known, failures alone.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from front_proxy.engine_client.texts import PromptFacts, TextDelta
from front_proxy.gateway.request_context import REQUEST_CONTEXT
from front_proxy.openai_api.fast_path.outlet import HttpOutlet
from front_proxy.openai_api.fast_path.stream_forms import StreamForm, Write, blanks
from front_proxy.openai_api.fast_path.stream_outputs import MARK, Outputs, choice_of, output_of, quoted

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""
# What grows in the usage of each chunk. No text has these quotes, which JSON would escape.
_COUNT = re.compile(r'"(completion|total)_tokens":\d+')


async def events(writer: StreamWriter, texts: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[str, None]:
    """All events, but those of the stream's middle that the request's outlet takes.

    The last piece has the last text, the usage and ``DONE``.
    """
    piece = ""
    outlet = REQUEST_CONTEXT.get().outlet
    async with aclosing(texts), aclosing(writer.written):
        try:
            async for delta in texts:
                piece = await writer.piece(delta)
                if isinstance(outlet, HttpOutlet):
                    outlet.begin(writer.middle)
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
        write: Callable[[Outputs], AsyncGenerator[str, None]],
        *,
        choices: int,
        with_roles: bool,
        silent: bool,
    ) -> None:
        """``write``: vLLM's generator over its outputs. ``with_roles``: it begins with an event for each choice.

        ``silent``: tokens without text make no event.
        """
        self._outputs = Outputs()
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
        index = delta.index
        if delta.finish_reason is None:
            return before + self.middle(delta.text, len(delta.token_ids), index)
        self._tokens[index] += len(delta.token_ids)
        self._unfinished -= 1
        return before + await self._last(delta)

    async def _last(self, delta: TextDelta) -> str:
        """The events of a choice's last delta, or those that are left of them for now."""
        assert self._prompt is not None
        index = delta.index
        self._outputs.put(output_of(self._prompt, [choice_of(index, delta, self._tokens[index])]))
        # vLLM's generator writes nothing of a choice that was empty.
        there = bool(delta.text or self._tokens[index])
        return "" if self.whole or not there else await anext(self.written)

    def middle(self, text: str, tokens: int, index: int = 0) -> str:
        """The event of so many more tokens of a choice that goes on, or nothing. The first delta is for ``piece``."""
        self._tokens[index] += tokens
        if not text and (self._silent or not self._tokens[index]):
            return ""
        head, tail = self._templates[index]
        if self._with_usage:
            assert self._prompt is not None
            so_far = self._tokens[index]
            tail %= {"completion": so_far, "total": len(self._prompt.token_ids) + so_far}
        return head + quoted(text) + tail

    async def end(self, error: Exception | None = None) -> str:
        """What vLLM's generator has still to write: the last delta and the usage, or the error; and ``DONE``."""
        self._outputs.put(error)
        return "".join([event async for event in self.written])

    async def _begin(self, first: TextDelta) -> str:
        assert first.prompt is not None, "the first delta has the prompt's facts"
        self._prompt = first.prompt
        choices = range(len(self._tokens))
        self._outputs.put(output_of(self._prompt, [choice_of(index) for index in choices]))
        roles = [await anext(self.written) for _ in choices if self._with_roles]
        self._templates = [_template(await anext(self.written)) for _ in choices]
        self._with_usage = bool(_COUNT.search(self._templates[0][1]))
        if self._with_usage:
            self._templates = [(head, _with_counts(tail)) for head, tail in self._templates]
        return "".join(roles)


class FormWriter(StreamWriter):
    """Writes an answer of one choice whose form is known."""

    def __init__(self, form: StreamForm, write: Write, name: str, created_s: int | None, *, silent: bool) -> None:
        """``name``: the answer's id. ``created_s``: the time that it tells; None: the time at which it begins."""
        super().__init__(functools.partial(write, name), choices=1, with_roles=False, silent=silent)
        self._form = form
        self._write = write
        self._name = name
        self._created_s = created_s
        self._ending = ""

    async def end(self, error: Exception | None = None) -> str:
        """The same."""
        return self._ending or await super().end(error)

    async def _begin(self, first: TextDelta) -> str:
        assert first.prompt is not None, "the first delta has the prompt's facts"
        self._prompt = first.prompt
        if self._created_s is None:
            self._created_s = int(time.time())
        roles, chunk = await self._form.opening(self._write, first.prompt)
        filled = {"name": quoted(self._name), "created": self._created_s, "text": quoted(MARK)}
        self._templates = [_template(chunk % filled)]
        return roles % filled

    async def _last(self, delta: TextDelta) -> str:
        assert self._prompt is not None and self._created_s is not None
        tokens = self._tokens[0]
        ending = await self._form.ending(self._write, self._prompt, delta, tokens)
        self._ending = ending % blanks(self._name, self._created_s, self._prompt, delta, tokens)
        return ""


def _template(event: str) -> tuple[str, str]:
    before, mark, behind = event.partition(f'"{MARK}"')
    if not mark:
        raise ValueError("vLLM's generator did not write the text as it was")
    return before, behind


def _with_counts(tail: str) -> str:
    """The format of a chunk's end that has its choice's usage so far."""
    return _COUNT.sub(r'"\1_tokens":%(\1)d', tail.replace("%", "%%"))
