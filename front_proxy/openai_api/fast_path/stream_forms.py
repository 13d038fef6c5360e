"""Streams that differ in ids, times, texts and counts alone share a form: what vLLM's generator wrote for the first.

To write the role, the first chunk, the end and the usage of a stream takes vLLM's generator 0.1 ms, as much as to
encode a prompt. Here it writes them once for each form, with marks, and each stream fills in its own.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from front_proxy.engine_client.texts import PromptFacts, TextDelta
from front_proxy.openai_api.fast_path.stream_outputs import MARK, Outputs, choice_of, output_of, quoted

Write = Callable[[str, Outputs], AsyncGenerator[str, None]]
"""vLLM's generator for a stream of this id over these outputs."""
# Fields of a request that vLLM's generators do not read, or that count for the form's key.
_HARMLESS = frozenset(
    {
        "bad_words",
        "cache_salt",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "min_p",
        "min_tokens",
        "model",
        "n",
        "presence_penalty",
        "priority",
        "prompt",
        "repetition_penalty",
        "request_id",
        "response_format",
        "seed",
        "session_id",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "structured_outputs",
        "temperature",
        "top_k",
        "top_p",
        "user",
    }
)
_NAME = f"name-{uuid.uuid4().hex}"
_NUMBER = re.compile(r'"(created|prompt_tokens|completion_tokens|total_tokens|cached_tokens|created_cache_tokens)":\d+')
_STOP_REASON = re.compile(r'"stop_reason":(?:\d+|"(?:[^"\\]|\\.)*")')


class StreamForms:
    """The forms of one route."""

    def __init__(self, serving: Any) -> None:
        """``serving``: vLLM's object whose generator writes these streams."""
        self._usage_forced: bool = serving.enable_force_include_usage
        self._forms: dict[tuple[str, bool], StreamForm] = {}

    def of(self, request: Any, model_name: str) -> StreamForm | None:
        """The form of its stream, perhaps not filled yet. None: only vLLM's generator can write that stream."""
        options = request.stream_options
        # A usage in each chunk counts on.
        if self._usage_forced or (options is not None and options.continuous_usage_stats):
            return None
        if request.n not in (None, 1) or not request.model_fields_set <= _HARMLESS:
            return None
        # Nothing else of these requests is in the events.
        key = (model_name, options is not None and bool(options.include_usage))
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = StreamForm()
        return form


class StreamForm:
    """The events of streams of one form."""

    def __init__(self) -> None:
        self._opening: tuple[str, str] | None = None
        self._endings: dict[tuple[Any, ...], str] = {}

    async def opening(self, write: Write, prompt: PromptFacts) -> tuple[str, str]:
        """Everything before the first text, and a chunk. Blanks: ``name``, ``created``; in the chunk, ``text``."""
        if self._opening is None:
            *roles, chunk = await _written(write, prompt)
            self._opening = _blank("".join(roles)), _blank(chunk)
        return self._opening

    async def ending(self, write: Write, prompt: PromptFacts, last: TextDelta, tokens: int) -> str:
        """The end of a stream of so many ``tokens``. It has the blanks of both, those of the usage, and ``stop``."""
        stopped, cached = last.stop_reason is not None, prompt.cached_tokens is not None
        created = prompt.created_cache_tokens is not None
        # An empty text, and a stream without any token, may make other events.
        key = (last.finish_reason, stopped, bool(last.text), bool(tokens), cached, created)
        if (ending := self._endings.get(key)) is None:
            begun = len(await _written(write, prompt))
            marked = msgspec.structs.replace(last, text=MARK if last.text else "")
            events = await _written(write, prompt, marked, tokens)
            ending = _blank("".join(events[begun:]))
            if stopped:
                ending = _STOP_REASON.sub('"stop_reason":%(stop)s', ending)
            self._endings[key] = ending
        return ending


def blanks(name: str, created_s: int, prompt: PromptFacts, last: TextDelta, tokens: int) -> dict[str, Any]:
    """What fills in the end of a stream."""
    prompt_tokens = len(prompt.token_ids)
    stop = last.stop_reason
    return {
        "name": quoted(name),
        "created": created_s,
        "text": quoted(last.text),
        "stop": quoted(stop) if isinstance(stop, str) else stop,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "cached_tokens": prompt.cached_tokens,
        "created_cache_tokens": prompt.created_cache_tokens,
    }


async def _written(write: Write, prompt: PromptFacts, last: TextDelta | None = None, tokens: int = 0) -> list[str]:
    """The events of a stream with one text in its middle. Without ``last`` only what comes before the end."""
    outputs = Outputs()
    outputs.put(output_of(prompt, [choice_of(0)]))
    events = []
    async with aclosing(write(_NAME, outputs)) as written:
        if last is None:
            async for event in written:
                events.append(event)
                if MARK in event:
                    return events
            raise ValueError("vLLM's generator did not write the text as it was")
        outputs.put(output_of(prompt, [choice_of(0, last, tokens)]))
        outputs.put(None)
        return [event async for event in written]


def _blank(events: str) -> str:
    """The events with blanks in place of the marks and the numbers."""
    events = events.replace("%", "%%").replace(f'"{_NAME}"', "%(name)s").replace(f'"{MARK}"', "%(text)s")
    if MARK in events:
        raise ValueError("vLLM's generator did not write the text or the id as it was")
    return _NUMBER.sub(r'"\1":%(\1)d', events)
