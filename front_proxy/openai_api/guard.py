"""The ASGI layer around vLLM's app: published routes, bounds, dropped fields, Retry-After, phases. Knows no vLLM."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from front_proxy.config import LIMITS, FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.identity import caller
from front_proxy.gateway.in_flight import InFlight
from front_proxy.gateway.metrics import DROPPED_FIELDS, REFUSALS
from front_proxy.gateway.request_context import REQUEST_CONTEXT, RequestContext, phases_ms
from front_proxy.openai_api.uploads import BodyRefused, ClientLeft, Uploads
from runtime.failures import Failure, FailureError, FailureKind
from runtime.rpc.failure_status import STATUS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

GENERATION_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
# vLLM registers more; what is not named here answers 404.
ROUTES = GENERATION_ROUTES | {
    "/v1/models",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ping",
    "/load",
    "/version",
    "/metrics",
}
CROWDED = "baton.crowded"
"""In the scope of a request on a connection that is one too many."""
CROWDED_ROUTES = frozenset({"/health", "/ping", "/metrics"})
"""Answered there too."""
NO_ROOM = "This front proxy has no room for more connections. Please try again later."
FORBIDDEN_HEADERS = frozenset({b"x-data-parallel-rank"})
FORBIDDEN_FIELDS = ("kv_transfer_params", "ec_transfer_params")
# Told as a status instead of inside a 200 stream, so that clients and balancers retry.
_STATUS_BEFORE_STREAM = frozenset(
    {FailureKind.EXHAUSTED, FailureKind.UNAVAILABLE, FailureKind.STATE_LOST, FailureKind.DEADLINE}
)
_ABSENT = object()
_RETRY_STATUSES = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


class HttpGuard:
    """Wraps an ASGI app. A generation takes its place in ``in_flight`` once its body is here."""

    def __init__(
        self, app: AsgiApp, config: FrontProxyConfig, in_flight: InFlight, limits: FrontProxyLimits = LIMITS
    ) -> None:
        self._app = app
        self._in_flight = in_flight
        self._limits = limits
        self._uploads = Uploads(config.request_bytes_max, limits)
        self._phases_header = limits.phases_header.lower().encode()
        self.retiring = False
        """Set: every response tells its client to close the connection."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or scope["path"] not in ROUTES:
            await self._refuse(scope, send, "no_route", HTTPStatus.NOT_FOUND, "Not Found")
            return
        if CROWDED in scope and scope["path"] not in CROWDED_ROUTES:
            await self._refuse(scope, send, "descriptors", HTTPStatus.SERVICE_UNAVAILABLE, NO_ROOM)
            return
        generates = scope["path"] in GENERATION_ROUTES and scope["method"] == "POST"
        try:
            context = RequestContext(caller(scope["headers"]), None)
            if generates:
                self._in_flight.check()
        except FailureError as error:
            await _send_failure(send, scope["path"], error.failure, self._limits.retry_after_s)
            return
        try:
            await self._forward(context, scope, receive, send, generates=generates)
        finally:
            if context.place is not None:
                context.place.leave()

    async def _forward(
        self,
        context: RequestContext,
        scope: MutableMapping[str, Any],
        receive: Receive,
        send: Send,
        *,
        generates: bool,
    ) -> None:
        headers: list[tuple[bytes, bytes]] = []
        explain = False
        length = 0
        for name, value in scope["headers"]:
            if name in FORBIDDEN_HEADERS:
                DROPPED_FIELDS.labels(name.decode()).inc()
                continue
            if name == self._phases_header:
                explain = value.strip() in (b"1", b"true")
            elif name == b"content-length" and value.isdigit():
                length = int(value)
            headers.append((name, value))
        if scope["method"] == "POST":
            address, _ = scope.get("client") or ("", 0)
            try:
                body = await self._uploads.read(receive, address, length)
                if generates:
                    context.place = self._in_flight.enter()
            except ClientLeft:
                return
            except BodyRefused as why:
                await self._refuse(scope, send, why.reason, why.status, str(why))
                return
            except FailureError as error:
                await _send_failure(send, scope["path"], error.failure, self._limits.retry_after_s)
                return
            body = _without_forbidden_fields(body)
            headers = [
                (name, str(len(body)).encode() if name == b"content-length" else value) for name, value in headers
            ]
            receive = _replay(body, receive)
        token = REQUEST_CONTEXT.set(context)
        response = _Response(
            send,
            context,
            path=scope["path"],
            explain=explain,
            retry_after_s=self._limits.retry_after_s,
            retiring=lambda: self.retiring,
        )
        try:
            await self._app({**scope, "headers": headers}, receive, response.send)
        finally:
            REQUEST_CONTEXT.reset(token)

    async def _refuse(
        self, scope: MutableMapping[str, Any], send: Send, reason: str, status: HTTPStatus, message: str
    ) -> None:
        REFUSALS.labels(reason).inc()
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": message})
            return
        await _send_error(send, scope["path"], status, message, self._limits.retry_after_s)


class _Response:
    """Passes one response on, adding headers and, on a stream, a last comment line."""

    def __init__(
        self,
        send: Send,
        context: RequestContext,
        *,
        path: str,
        explain: bool,
        retry_after_s: float,
        retiring: Callable[[], bool],
    ) -> None:
        self._send = send
        self._retiring = retiring
        self._context = context
        self._path = path
        self._explain = explain
        self._retry_after_s = retry_after_s
        self._held: Message | None = None
        self._streaming = False
        self._replaced = False
        self._passing = False
        """Nothing is left to be done but to pass on."""

    async def send(self, message: Message) -> None:
        """The app's messages, in order."""
        if self._passing:
            await self._send(message)
            return
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == "http.response.body":
            await self._body(message)
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
        names = {name.lower() for name, _ in headers}
        if self._retiring():
            headers.append((b"connection", b"close"))
        if message["status"] in _RETRY_STATUSES and b"retry-after" not in names:
            failure = self._context.failure
            advice_s = failure.retry_after_s if failure is not None and failure.retry_after_s else self._retry_after_s
            headers.append((b"retry-after", _whole_seconds(advice_s)))
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        self._streaming = kind.startswith(b"text/event-stream")
        if self._explain and not self._streaming and (phases := phases_ms(self._context)):
            timing = ", ".join(f"{name};dur={phase_ms:.3f}" for name, phase_ms in phases.items())
            headers.append((b"server-timing", timing.encode()))
        started = {**message, "headers": headers}
        if self._streaming:
            # Until the first chunk is there nothing was promised, and a failure may still become a status.
            self._held = started
            return
        await self._send(started)

    async def _body(self, message: Message) -> None:
        if self._held is not None:
            failure = self._context.failure
            if failure is not None and not self._context.delivered and failure.kind in _STATUS_BEFORE_STREAM:
                self._replaced = True
                await _send_failure(self._send, self._path, failure, self._retry_after_s)
                return
            await self._send(self._held)
            self._held = None
            self._passing = not self._explain
        last = not message.get("more_body", False)
        if last and self._streaming and self._explain and (phases := phases_ms(self._context)):
            told = {f"{name}_ms": phase_ms for name, phase_ms in phases.items()}
            comment = f": baton {json.dumps(told)}\n\n".encode()
            message = {**message, "body": message.get("body", b"") + comment}
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        # What comes after the body is the client leaving.
        return await receive()

    return replay


def _without_forbidden_fields(body: bytes) -> bytes:
    """The body without fields that only Baton may set. Parsed only when it may hold one, escaped or in UTF-16."""
    if b"_transfer_params" not in body and b"\\u00" not in body and b"\0" not in body:
        return body
    try:
        value = json.loads(body)
        if not isinstance(value, dict):
            return body
        dropped = [field for field in FORBIDDEN_FIELDS if value.pop(field, _ABSENT) is not _ABSENT]
        cleaned = json.dumps(value).encode() if dropped else body
    except (ValueError, RecursionError):
        return body  # vLLM's own words for malformed or too deeply nested JSON
    for field in dropped:
        DROPPED_FIELDS.labels(field).inc()
    return cleaned


async def _send_failure(send: Send, path: str, failure: Failure, retry_after_s: float) -> None:
    """``retry_after_s``: for a failure that advises no time of its own."""
    status = HTTPStatus(STATUS[failure.kind].http_status)
    await _send_error(send, path, status, failure.message, failure.retry_after_s or retry_after_s)


def _whole_seconds(seconds: float) -> bytes:
    return str(max(1, math.ceil(seconds))).encode()


async def _send_error(send: Send, path: str, status: HTTPStatus, message: str, retry_after_s: float) -> None:
    error: dict[str, Any] = {"message": message, "type": status.phrase, "param": None, "code": int(status)}
    body: dict[str, Any] = {"error": error}
    if path == "/v1/messages":
        body = {"type": "error", "error": {"type": status.phrase, "message": message}}
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        # The rest of the body was not read and is not worth reading.
        headers.append((b"connection", b"close"))
    if status in _RETRY_STATUSES:
        headers.append((b"retry-after", _whole_seconds(retry_after_s)))
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})
