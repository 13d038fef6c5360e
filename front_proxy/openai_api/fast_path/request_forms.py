"""Requests that differ in their prompt alone share a form: how vLLM's objects were asked to answer the first of them.

To parse, check and prepare a chat takes vLLM more CPU than to encode its prompt, and what comes of it follows from the
fields of the body. So each set of fields goes through vLLM once. The prompt of every request is rendered by vLLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal

import msgspec
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.renderers import ChatParams, TokenizeParams

from front_proxy.engine_client.client import RemoteEngineClient
from front_proxy.engine_client.prepared import Prepared
from front_proxy.engine_client.rendering import PlainChat
from front_proxy.gateway.request_context import REQUEST_CONTEXT, RequestContext

FORMS_MAX = 128
"""Of one route. For one more the oldest is given up."""
KEY_BYTES_MAX = 2048
"""A body with more beside its prompt is like no other one."""
# Each request has its own, or vLLM's validated object is one request's own.
_OWN_FIELDS = frozenset({"cache_salt", "request_id", "response_format", "structured_outputs"})

# What is noted of a request that others can be like.
_ASKED = frozenset({"render", "context_tokens", "stream", "limit_tokens", "names"})

Key = tuple[str | bytes, ...]


class _Message(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: Literal["system", "user", "assistant"]
    content: str


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_messages = msgspec.json.Decoder(list[_Message])
_text = msgspec.json.Decoder(str)


def _conversation(raw: msgspec.Raw) -> Any:
    return [{"role": each.role, "content": each.content} for each in _messages.decode(raw)]


_PROMPTS: dict[str, Callable[[msgspec.Raw], Any]] = {
    "messages": _conversation,
    "prompt": lambda raw: {"prompt": _text.decode(raw)},
}


class RequestForm(msgspec.Struct, frozen=True):
    """Of requests with the same fields."""

    render: Callable[[Any], Awaitable[Any]]
    """A prompt, by vLLM's renderer."""
    stream: Callable[[Any, str], AsyncGenerator[str, None]]
    """The answer's events, of its texts and with its id."""
    prefix: str
    """Of the answer's id."""
    suffix: str
    """Of the engine's id for it."""
    like: Prepared
    context_tokens: int
    """The longest prompt and output, by which it renders."""
    limit_tokens: int
    """Of the output, where the context has so much left."""


class RequestForms:
    """The forms of one route whose prompt is the body's ``field``."""

    def __init__(self, field: str, client: RemoteEngineClient) -> None:
        self._field = field
        self._prompt = _PROMPTS[field]
        self._client = client
        self._forms: dict[Key, RequestForm] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._forms

    def split(self, body: bytes) -> tuple[Key, Any] | None:
        """What makes the form, and the prompt. None: it has none that this knows, or is wrong."""
        try:
            fields = _fields.decode(body)
            prompt = self._prompt(fields.pop(self._field))
        except (ValueError, KeyError, RecursionError):
            return None
        if not prompt or not _OWN_FIELDS.isdisjoint(fields):
            return None
        key = tuple(part for name, raw in fields.items() for part in (name, bytes(raw)))
        return None if sum(map(len, key)) > KEY_BYTES_MAX else (key, prompt)

    def learn(self, key: Key, context: RequestContext) -> None:
        """The request of ``context`` was answered. It need not be one that others can be like."""
        asked, validated = context.asked, context.validated
        if not asked or asked.keys() != _ASKED or validated is None:
            return
        context_tokens = asked["context_tokens"]
        room = (context_tokens or 0) - len(validated.prompt_token_ids)
        if validated.sampling_params.max_tokens != min(asked["limit_tokens"], room):
            return
        if len(self._forms) >= FORMS_MAX:
            del self._forms[next(iter(self._forms))]
        prefix, suffix = asked["names"]
        self._forms[key] = RequestForm(
            render=asked["render"],
            stream=asked["stream"],
            prefix=prefix,
            suffix=suffix,
            like=Prepared.of(validated),
            context_tokens=context_tokens,
            limit_tokens=asked["limit_tokens"],
        )

    async def begin(self, key: Key, prompt: Any, request_id: str) -> AsyncGenerator[str, None] | None:
        """The events of the answer. None: no form is known, or only vLLM can say what is wrong."""
        form, client = self._forms.get(key), self._client
        if form is None or not self._fits(form):
            return None
        token_ids = (await form.render(prompt))["prompt_token_ids"]
        room = form.context_tokens - len(token_ids)
        enough = room >= max(1, form.like.request.sampling_params.min_tokens)
        if not (token_ids and enough and self._fits(form)):
            return None
        name = form.prefix + request_id
        texts = client.texts_like(form.like, token_ids, name + form.suffix, min(form.limit_tokens, room))
        return form.stream(texts, name)

    def _fits(self, form: RequestForm) -> bool:
        """Whether there are workers, and their context is that by which the form renders."""
        self._client.refresh_limits()
        return not self._client.errored and self._client.model_config.max_model_len == form.context_tokens


def note(**how: Any) -> None:
    """How vLLM's objects were asked, where that is to be noted."""
    context = REQUEST_CONTEXT.get(None)
    if context is not None and context.asked is not None:
        context.asked.update(how)


def is_noted(serving: Any) -> bool:
    """Whether it is to be noted how the present request is answered. Not where vLLM logs each request."""
    return REQUEST_CONTEXT.get().asked is not None and serving.request_logger is None


class _Renderer:
    """A renderer that notes how a prompt was to be rendered. In all else it is ``renderer``."""

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    async def render_chat_async(self, conversations: Any, *args: Any, **kwargs: Any) -> Any:
        quick: PlainChat | None = None
        looked = False

        async def again(messages: Any) -> Any:
            nonlocal quick, looked
            if quick is not None and (token_ids := quick(messages)) is not None:
                return {"prompt_token_ids": token_ids}
            _, (prompt,) = await self._renderer.render_chat_async([messages], *args, **kwargs)
            if not looked:
                looked = True
                quick = self._plain_chat(messages, prompt["prompt_token_ids"], *args)
            return prompt

        note(render=again, context_tokens=_context_tokens(*args, **kwargs))
        return await self._renderer.render_chat_async(conversations, *args, **kwargs)

    def _plain_chat(self, messages: Any, token_ids: Any, *params: Any) -> PlainChat | None:
        """The short way for chats with these parameters. None: it made something else of this one than vLLM."""
        plain_chats = getattr(self._renderer, "plain_chats", None)
        if plain_chats is None or [type(each) for each in params] != [ChatParams, TokenizeParams]:
            return None
        quick: PlainChat | None = plain_chats(*params)
        return quick if quick is not None and quick(messages) == token_ids else None

    async def render_cmpl_async(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        async def again(prompt: Any) -> Any:
            (rendered,) = await self._renderer.render_cmpl_async([prompt], *args, **kwargs)
            return rendered

        note(render=again, context_tokens=_context_tokens(*args, **kwargs))
        return await self._renderer.render_cmpl_async(prompts, *args, **kwargs)


def _context_tokens(*args: Any, **kwargs: Any) -> int | None:
    """Of a prompt and its output together at most, as a renderer is told."""
    return next((each.max_total_tokens for each in (*args, *kwargs.values()) if isinstance(each, TokenizeParams)), None)


def note_rendering(serving: Any) -> None:
    """Have a serving object of vLLM note how it renders, for requests of which that is wanted."""
    if not isinstance(serving.online_renderer.renderer, _Renderer):
        serving.online_renderer.renderer = _Renderer(serving.online_renderer.renderer)


def limit_tokens(serving: Any, asked_tokens: int | None) -> int:
    """Of the output of such a request, behind a prompt that leaves room for so many."""
    defaults, override = serving.default_sampling_params, serving.override_max_tokens
    return get_max_tokens(serving.model_config.max_model_len, asked_tokens, 0, defaults, override)
