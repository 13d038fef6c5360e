"""Answers chats and completions without the app's layers. Parsing, rendering and errors stay vLLM's own.

vLLM's serving objects are copied. The copies stream through ``StreamWriter``, and their engine client yields text
instead of vLLM's outputs. A request that is not understood here goes to vLLM's app, which says what is wrong with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import json
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, Self

import msgspec
import structlog
from fastapi import FastAPI
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.elastic_ep.middleware import ScalingMiddleware
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from front_proxy.engine_client import private
from front_proxy.engine_client.client import RemoteEngineClient
from front_proxy.engine_client.parsers import reads_only_tools
from front_proxy.engine_client.texts import TextDelta
from front_proxy.gateway.metrics import WAYS
from front_proxy.gateway.request_context import REQUEST_CONTEXT
from front_proxy.openai_api.answer import CYCLE, WHEN_LEFT, Header, Receive, Scope, Send
from front_proxy.openai_api.fast_path.detour import Parser, detour
from front_proxy.openai_api.fast_path.outlet import HttpOutlet
from front_proxy.openai_api.fast_path.request_forms import (
    RequestForms,
    is_noted,
    limit_tokens,
    note,
    note_rendering,
)
from front_proxy.openai_api.fast_path.stream_forms import StreamForms
from front_proxy.openai_api.fast_path.stream_outputs import OfOnePrompt, Outputs
from front_proxy.openai_api.fast_path.stream_writer import DONE, FormWriter, StreamWriter, events

log = structlog.get_logger(__name__)

_ERROR = "baton.error"
# With this request header vLLM's app may add to its answer what the fast path does not.
_LOAD_HEADER = b"endpoint-load-metrics-format"
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8")]
_COSTLY_OPTIONS = (
    "enable_server_load_tracking",
    "enable_log_outputs",
    "enable_per_request_metrics",
)
_HARMLESS_LAYERS = frozenset({ScalingMiddleware})

# What a session, a priority or a trace is told by, beside the body.
_OWN_HEADERS = frozenset({b"x-session-id", b"x-vllm-priority", b"traceparent", b"tracestate"})
_FAST = WAYS.labels("fast")


class _Api(msgspec.Struct, frozen=True):
    model: type[Any]
    create: Callable[[Any, Request], Awaitable[Any]]
    """vLLM's."""
    forms: RequestForms


class FastPath:
    """Built once over vLLM's app. Baton's own layers already do what the app's layers do around each answer."""

    def __init__(self, app: FastAPI, client: RemoteEngineClient, args: Namespace) -> None:
        state = app.state
        self._app = app
        self._keep_alive_s = float(getattr(args, "sse_keep_alive_interval", 0))
        chat = _chat(state.openai_serving_chat, client)
        completion = _completion(state.openai_serving_completion, client)
        self._parser: Parser = "none"
        if chat.parser_cls is not None:
            names = args.tool_call_parser, args.structured_outputs_config.reasoning_parser
            self._parser = "tools" if reads_only_tools(*names) else "chats"
        self._apis: dict[str, _Api] = {
            "/v1/chat/completions": _Api(
                ChatCompletionRequest, chat.create_chat_completion, RequestForms("messages", client)
            ),
            "/v1/completions": _Api(CompletionRequest, completion.create_completion, RequestForms("prompt", client)),
        }
        for api in self._apis.values():
            private.forget_deprecations(api.model)
        handlers = dict(app.exception_handlers)
        self._failing = ServerErrorMiddleware(
            ExceptionMiddleware(_raise, handlers={kind: handlers[kind] for kind in handlers if kind is not Exception}),
            handler=handlers.get(Exception),
        )

    @classmethod
    def over(cls, app: FastAPI, client: RemoteEngineClient, args: Namespace) -> Self | None:
        """None where settings of vLLM's app do something to every request or answer."""
        layers = {layer.cls for layer in app.user_middleware} - _HARMLESS_LAYERS
        options = {name for name in _COSTLY_OPTIONS if getattr(args, name)}
        if layers or options:
            reasons = sorted({*options, *(layer.__name__ for layer in layers)})
            log.warning("every answer goes through vLLM's app, which costs more CPU", because_of=reasons)
            return None
        return cls(app, client, args)

    async def answers(self, route: str, body: bytes, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request whose body is here. False: it was not touched, and vLLM's app must answer it."""
        if route not in self._apis:
            return False
        api, context = self._apis[route], REQUEST_CONTEXT.get()
        special, plain, request_id = _read(scope["headers"])
        split = api.forms.split(body) if plain and not special else None
        request = None
        if split is None or split[0] not in api.forms:
            request = None if special else _parsed(api.model, body)
            why = "special" if request is None else detour(request, self._parser)
            if why:
                WAYS.labels(why).inc()
                # A parser reads this chat. If it has no tools, parsers.py does not mark it, so it is marked here.
                context.one_token |= why == "tools"
                return False
        _FAST.inc()
        if CYCLE in scope and not self._keep_alive_s:
            # vLLM's keep-alive sees only what is yielded.
            context.outlet = HttpOutlet(scope[CYCLE])
        scope = {**scope, "app": self._app}

        async def create() -> Any:
            """The answer, or the events of one."""
            asked = request
            if split is not None:
                if asked is None and (events := await api.forms.begin(*split, request_id)) is not None:
                    return events
                context.asked = {}
            return await api.create(asked or api.model.model_validate(json.loads(body)), Request(scope))

        await _until_client_leaves(scope, self._answer(create, scope, receive, send))
        if split is not None and context.failure is None:
            api.forms.learn(split[0], context)
        return True

    async def _answer(self, create: Callable[[], Awaitable[Any]], scope: Scope, receive: Receive, send: Send) -> None:
        respond: Awaitable[None]
        try:
            answer = await create()
            if isinstance(answer, AsyncGenerator):
                respond = self._stream(answer, send)
            else:
                status = answer.error.code if isinstance(answer, ErrorResponse) else 200
                respond = JSONResponse(answer.model_dump(), status)(scope, receive, send)
        except Exception as error:  # noqa: BLE001 vLLM's handlers say what becomes of it
            respond = self._failing({**scope, _ERROR: error}, receive, send)
        await respond

    async def _stream(self, answer: AsyncGenerator[str, None], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        async with contextlib.aclosing(with_sse_keep_alive(answer, self._keep_alive_s)) as pieces:
            async for piece in pieces:
                more = not piece.endswith(DONE)
                await send({"type": "http.response.body", "body": piece.encode(), "more_body": more})


class _Texts:
    """An engine client that gives a streamed answer's text alone. In all else it is ``client``."""

    def __init__(self, client: RemoteEngineClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, params: SamplingParams, *args: Any, **kwargs: Any) -> Any:
        streamed = params.output_kind is RequestOutputKind.DELTA
        return (self._client.texts if streamed else self._client.generate)(prompt, params, *args, **kwargs)


def _chat(serving: Any, client: RemoteEngineClient) -> Any:
    """A copy of vLLM's serving of chats that streams through ``StreamWriter``."""
    serving = copy.copy(serving)
    serving.engine_client = _Texts(client)
    note_rendering(serving)
    write, forms = serving.chat_completion_stream_generator, StreamForms(serving)

    def stream(
        request: ChatCompletionRequest, texts: Any, name: str, model_name: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        def write_as(name: str, outputs: Outputs) -> AsyncGenerator[str, None]:
            return write(request, outputs, name, model_name, *args, **kwargs)

        # Where a tool parser is set, vLLM writes no event for tokens that add no text.
        silent = serving.parser_cls is not None
        writer: StreamWriter
        if (form := forms.of(request, model_name)) is not None:
            writer = FormWriter(form, write_as, name, None, silent=silent)
            if is_noted(serving):
                # Nothing of the prompt is kept.
                like, rest = request.model_copy(update={"messages": []}), args[1:]

                def again(texts: Any, name: str) -> AsyncGenerator[str, None]:
                    return stream(like, texts, name, model_name, [], *rest, **kwargs)

                asked_tokens = request.max_completion_tokens
                asked_tokens = request.max_tokens if asked_tokens is None else asked_tokens
                note(stream=again, names=("chatcmpl-", ""), limit_tokens=limit_tokens(serving, asked_tokens))
        else:
            choices = request.n or 1
            writer = StreamWriter(functools.partial(write_as, name), choices=choices, with_roles=True, silent=silent)
        return events(writer, texts)

    serving.chat_completion_stream_generator = stream
    return serving


def _completion(serving: Any, client: RemoteEngineClient) -> Any:
    """The same for completions."""
    serving = copy.copy(serving)
    serving.engine_client = _Texts(client)
    note_rendering(serving)
    write, forms = serving.completion_stream_generator, StreamForms(serving)

    def stream(
        request: CompletionRequest,
        inputs: Any,
        texts: Any,
        name: str,
        created_s: int,
        model_name: str,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        def write_as(name: str, outputs: Outputs) -> AsyncGenerator[str, None]:
            return write(request, inputs, OfOnePrompt(outputs), name, created_s, model_name, **kwargs)

        writer: StreamWriter
        if (form := forms.of(request, model_name)) is not None:
            writer = FormWriter(form, write_as, name, created_s, silent=False)
            if is_noted(serving):
                like = request.model_copy(update={"prompt": ""})

                def again(texts: Any, name: str) -> AsyncGenerator[str, None]:
                    of_first = _numbered(texts)
                    return stream(like, [tokens_input([])], of_first, name, int(time.time()), model_name, **kwargs)

                note(stream=again, names=("cmpl-", "-0"), limit_tokens=limit_tokens(serving, request.max_tokens))
        else:
            writer = StreamWriter(functools.partial(write_as, name), choices=request.n, with_roles=False, silent=False)
        return events(writer, _of_one_prompt(texts))

    serving.completion_stream_generator = stream
    return serving


async def _of_one_prompt(texts: AsyncGenerator[tuple[int, TextDelta], None]) -> AsyncGenerator[TextDelta, None]:
    async with contextlib.aclosing(texts):
        async for _, delta in texts:
            yield delta


async def _numbered(texts: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[tuple[int, TextDelta], None]:
    async with contextlib.aclosing(texts):
        async for delta in texts:
            yield 0, delta


def _read(headers: Iterable[Header]) -> tuple[bool, bool, str]:
    """Whether only vLLM's app can answer a request with these headers, perhaps with an error.

    And whether they say nothing of their own, and the request's id.
    """
    kind, request_id, special, plain = b"", b"", False, True
    for name, value in headers:
        if name == b"content-type":
            kind = kind or value
        elif name == b"x-request-id":
            request_id = request_id or value
        elif name == _LOAD_HEADER:
            special = True
        elif name in _OWN_HEADERS:
            plain = False
    special = special or kind.split(b";", 1)[0].lower() != b"application/json"
    return special, plain and bool(request_id), request_id.decode("latin-1")


def _parsed(model: type[Any], body: bytes) -> Any | None:
    """The request. None: vLLM's app says what is wrong with it."""
    try:
        return model.model_validate(json.loads(body))
    except Exception:  # noqa: BLE001 whatever it is, vLLM's app meets it too
        return None


async def _raise(scope: Scope, _receive: Receive, _send: Send) -> None:
    raise scope[_ERROR]


async def _until_client_leaves(scope: Scope, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``; cancel it when the client has left."""
    this = asyncio.current_task()
    assert this is not None
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        this.cancel()

    when_left = scope.get(WHEN_LEFT, lambda _: None)
    when_left(leave)
    try:
        await work
    except asyncio.CancelledError:
        if not left:
            raise
    finally:
        when_left(None)
        if left:
            this.uncancel()
