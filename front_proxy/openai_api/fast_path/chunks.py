"""Streamed answers as vLLM's app writes them, byte for byte. Generates nothing.

A chunk of vLLM's is a pydantic object that is made and printed for each token. Here it is printed once for each choice
of an answer, with a mark in place of the text. What comes once in an answer, its role, end and usage, stays vLLM's.
"""

from __future__ import annotations

import json.encoder
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

import structlog
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo
from vllm.exceptions import GenerationError

from front_proxy.engine_client.texts import PromptUsage, TextDelta
from runtime.failures import FailureError

log = structlog.get_logger(__name__)

DONE = "data: [DONE]\n\n"
_MARK = f"text-{uuid.uuid4().hex}"
# As pydantic escapes: what JSON demands, and no more.
_quoted = json.encoder.encode_basestring


class _Answer(ABC):
    """Writes the events of one streamed answer."""

    def __init__(
        self,
        serving: Any,
        request: ChatCompletionRequest | CompletionRequest,
        request_id: str,
        model: str,
        created: int,
    ) -> None:
        self._serving = serving
        self._every = {"id": request_id, "created": created, "model": model}
        options = request.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._templates: dict[int, tuple[str, str]] = {}
        self._tokens = [0] * (request.n or 1)
        self._prompt: PromptUsage | None = None
        self._unfinished = len(self._tokens)

    @property
    def whole(self) -> bool:
        """Every choice has ended."""
        return self._unfinished == 0

    @abstractmethod
    def begin(self) -> str:
        """The events before the first text."""

    @abstractmethod
    def chunk(self, index: int, text: str, finish: TextDelta | None) -> ChatCompletionStreamResponse | Any:
        """vLLM's chunk. ``finish``: it is the choice's last one."""

    @abstractmethod
    def usage_chunk(self, prompt: PromptUsage, tokens: int) -> str:
        """The event that tells the usage."""

    def events(self, delta: TextDelta) -> str:
        """The events of one delta; may be none."""
        text, index = delta.text, delta.index
        events = ""
        if self._prompt is None:
            self._prompt = delta.prompt
            events = self.begin()
        if not text and not delta.tokens and not self._tokens[index]:
            return events
        self._tokens[index] += delta.tokens
        if delta.finish_reason is not None:
            self._unfinished -= 1
            if delta.finish_reason == "error":
                self._serving._raise_if_error("error", self._every["id"])
            chunk = self.chunk(index, text, delta)
            if not self._with_usage and self._serving.system_fingerprint is not None:
                chunk.system_fingerprint = self._serving.system_fingerprint
            return events + _event(chunk.model_dump_json(exclude_unset=True))
        if not text and self.silent_without_text:
            return events
        template = self._templates.get(index)
        if template is None:
            printed = _event(self.chunk(index, _MARK, None).model_dump_json(exclude_unset=True))
            before, _, behind = printed.partition(f'"{_MARK}"')
            template = self._templates[index] = before, behind
        return events + template[0] + _quoted(text) + template[1]

    silent_without_text = False
    """Tokens without text make no chunk."""

    def end(self) -> str:
        """The events behind the last text."""
        if not self._with_usage:
            return DONE
        prompt = self._prompt or PromptUsage(tokens=0, cached_tokens=None, created_cache_tokens=None)
        return self.usage_chunk(prompt, sum(self._tokens)) + DONE

    def failure(self, error: Exception) -> str:
        """The events that tell a failure."""
        if isinstance(error, GenerationError):
            return _event(self._serving._convert_generation_error_to_streaming_response(error)) + DONE
        if not isinstance(error.__cause__, FailureError):
            log.error("a streamed answer broke", request_id=self._every["id"], exc_info=error)
        return _event(self._serving.create_streaming_error_response(error)) + DONE


class _ChatAnswer(_Answer):
    def __init__(self, serving: Any, request: ChatCompletionRequest, request_id: str, model: str) -> None:
        super().__init__(serving, request, request_id, model, int(time.time()))
        self._role = serving.get_chat_request_role(request)
        # A parser that finds no tool call says nothing where there is no text.
        self.silent_without_text = serving.parser_cls is not None

    def begin(self) -> str:
        return "".join(
            self._print(
                ChatCompletionResponseStreamChoice(
                    index=index,
                    delta=DeltaMessage(role=self._role, content=""),
                    logprobs=None,
                    finish_reason=None,
                ),
                prompt_token_ids=None,
                prompt_text=None,
            )
            for index in range(len(self._tokens))
        )

    def _print(self, choice: ChatCompletionResponseStreamChoice, **more: Any) -> str:
        return _event(self._chunk([choice], **more).model_dump_json(exclude_unset=True))

    def _chunk(self, choices: list[ChatCompletionResponseStreamChoice], **more: Any) -> ChatCompletionStreamResponse:
        return ChatCompletionStreamResponse(object="chat.completion.chunk", choices=choices, **self._every, **more)

    def chunk(self, index: int, text: str, finish: TextDelta | None) -> ChatCompletionStreamResponse:
        told = {} if finish is None else {"stop_reason": finish.stop_reason}
        silent = finish is not None and not text and self.silent_without_text
        choice = ChatCompletionResponseStreamChoice(
            index=index,
            delta=DeltaMessage() if silent else DeltaMessage(content=text),
            logprobs=None,
            finish_reason=None if finish is None else finish.finish_reason,
            token_ids=None,
            **told,
        )
        return self._chunk([choice])

    def usage_chunk(self, prompt: PromptUsage, tokens: int) -> str:
        usage = _usage(prompt, tokens)
        known = prompt.cached_tokens is not None or prompt.created_cache_tokens is not None
        if self._serving.enable_prompt_tokens_details and known:
            usage.prompt_tokens_details = PromptTokenUsageInfo(
                cached_tokens=prompt.cached_tokens, created_cache_tokens=prompt.created_cache_tokens
            )
        chunk = self._chunk([], usage=usage, system_fingerprint=self._serving.system_fingerprint)
        return _event(chunk.model_dump_json(exclude_unset=True, exclude_none=True))


class _CompletionAnswer(_Answer):
    def begin(self) -> str:
        return ""

    def chunk(self, index: int, text: str, finish: TextDelta | None) -> CompletionStreamResponse:
        choice = CompletionResponseStreamChoice(
            index=index,
            text=text,
            logprobs=None,
            finish_reason=None if finish is None else finish.finish_reason,
            stop_reason=None if finish is None else finish.stop_reason,
            prompt_token_ids=None,
            token_ids=None,
        )
        return CompletionStreamResponse(object="text_completion", choices=[choice], **self._every)

    def usage_chunk(self, prompt: PromptUsage, tokens: int) -> str:
        usage = _usage(prompt, tokens)
        if self._serving.enable_prompt_tokens_details and prompt.cached_tokens is not None:
            usage.prompt_tokens_details = PromptTokenUsageInfo(cached_tokens=prompt.cached_tokens)
        fingerprint = self._serving.system_fingerprint
        chunk = CompletionStreamResponse(choices=[], usage=usage, system_fingerprint=fingerprint, **self._every)
        return _event(chunk.model_dump_json(exclude_unset=False, exclude_none=True))


def chat_events(
    serving: Any,
    request: ChatCompletionRequest,
    texts: AsyncGenerator[TextDelta, None],
    request_id: str,
    model: str,
    *_: Any,
    **__: Any,
) -> AsyncGenerator[str, None]:
    """Takes what vLLM's ``chat_completion_stream_generator`` takes, with texts in place of outputs."""
    return _events(_ChatAnswer(serving, request, request_id, model), texts)


def completion_events(
    serving: Any,
    request: CompletionRequest,
    _inputs: Any,
    texts: AsyncGenerator[tuple[int, TextDelta], None],
    request_id: str,
    created: int,
    model: str,
    **_: Any,
) -> AsyncGenerator[str, None]:
    """Takes what vLLM's ``completion_stream_generator`` takes, with texts in place of outputs."""
    return _events(_CompletionAnswer(serving, request, request_id, model, created), _of_one_prompt(texts))


async def _of_one_prompt(texts: AsyncGenerator[tuple[int, TextDelta], None]) -> AsyncGenerator[TextDelta, None]:
    async for _, delta in texts:
        yield delta


async def _events(answer: _Answer, texts: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[str, None]:
    """All events of an answer. The last piece has the last text, the usage and ``DONE``."""
    last = ""
    try:
        async for delta in texts:
            events = answer.events(delta)
            if answer.whole:
                last = events
            elif events:
                yield events
        last += answer.end()
    except Exception as error:  # noqa: BLE001 told to the client, as vLLM tells it
        last += answer.failure(error)
    yield last


def _usage(prompt: PromptUsage, tokens: int) -> UsageInfo:
    return UsageInfo(prompt_tokens=prompt.tokens, completion_tokens=tokens, total_tokens=prompt.tokens + tokens)


def _event(data: str) -> str:
    return f"data: {data}\n\n"
