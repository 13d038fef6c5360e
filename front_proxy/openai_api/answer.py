"""One HTTP answer on its way out: what every answer carries, errors in the client's shape, phases. Knows no vLLM."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from front_proxy.gateway.request_context import RequestContext, phases_ms
from front_proxy.openai_api.rate_headers import rate_headers
from runtime.failures import Failure, FailureKind
from runtime.rpc.failure_status import STATUS

Header = tuple[bytes, bytes]
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
CYCLE = "baton.cycle"
"""In the scope of a request: uvicorn's object for it and its answer."""
WHEN_LEFT = "baton.when_left"
"""In the scope of a request: takes what to do when its client leaves before the answer's end; None: nothing."""
HeadersOf = Callable[[Iterable[Header]], list[Header]]
"""Takes the headers of a request. Returns those that every answer to it carries."""

# Told as a status instead of inside a 200 stream, so that clients and balancers retry what may succeed later.
_STATUS_BEFORE_STREAM = frozenset(
    {
        FailureKind.BAD_REQUEST,
        FailureKind.UNAUTHENTICATED,
        FailureKind.FORBIDDEN,
        FailureKind.EXHAUSTED,
        FailureKind.UNAVAILABLE,
        FailureKind.STATE_LOST,
        FailureKind.DEADLINE,
    }
)
_KEY_STATUSES = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_ANTHROPIC_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_OPENAI_TYPES = {
    "invalid_api_key": "invalid_request_error",
    "rate_limit_exceeded": "requests",
    "insufficient_quota": "insufficient_quota",
}
_RETRY_STATUSES = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


class Answer:
    """Passes the app's answer on. Until something was promised, an error of ours may take its place."""

    def __init__(
        self, send: Send, scope: Scope, headers_of: HeadersOf, *, retry_after_s: float, retiring: Callable[[], bool]
    ) -> None:
        """``retry_after_s``: told with a refusal that has no time of its own.

        ``retiring`` is asked when the answer begins. If it says yes, the answer closes its connection.
        """
        self.context: RequestContext | None = None
        """Of the request, once it is known who asks."""
        self.asked: list[Header] = scope["headers"]
        """The headers of the request, with its id where it got one here."""
        self.explain = False
        """Whether the answer says where the time to its first token went."""
        self.route = ""
        """That takes the request."""
        self.begun = False
        """Its status was sent."""
        self.status = 0
        """That was sent, or waits for the first piece of a stream. 0: there is none yet."""
        self.length_bytes = 0
        """That the answer said its body has."""
        self._send = send
        self._scope = scope
        self._headers_of = headers_of
        self._retry_after_s = retry_after_s
        self._retiring = retiring
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

    async def refuse(
        self,
        status: HTTPStatus,
        message: str,
        *,
        retry_after_s: float | None = None,
        close: bool = False,
        code: str = "",
    ) -> None:
        """Answer with an error of ours; what the app says afterwards is dropped. ``close``: the connection, too."""
        self._replaced = True
        content = error_content(status, message, self._scope["path"], code)
        headers = error_headers(content)
        if close:
            headers.append((b"connection", b"close"))
        if retry_after_s and status in _RETRY_STATUSES:
            headers.append((b"retry-after", whole_seconds(retry_after_s)))
        await self._begin({"type": "http.response.start", "status": int(status), "headers": headers})
        await self._send({"type": "http.response.body", "body": content, "more_body": False})

    async def fail(self, failure: Failure) -> None:
        """Answer with a failure."""
        status = HTTPStatus(STATUS[failure.kind].http_status)
        await self.refuse(status, failure.message, retry_after_s=failure.retry_after_s, code=failure.code)

    async def _start(self, message: Message) -> None:
        headers: list[Header] = list(message.get("headers", ()))
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        self._streaming = kind.startswith(b"text/event-stream")
        if self._streaming:
            # Nothing is promised before the first chunk comes: a failure may still become a status.
            self._held = message
            self.status = int(message["status"])
            return
        failure = None if self.context is None else self.context.failure
        if failure is not None and failure.code and message["status"] >= HTTPStatus.BAD_REQUEST:
            # The app's words have no such code.
            await self.fail(failure)
            return
        if self.explain and (phases := self._phases_ms()):
            timing = ", ".join(f"{name};dur={phase_ms:.3f}" for name, phase_ms in phases.items())
            message = {**message, "headers": [*headers, (b"server-timing", timing.encode())]}
        await self._begin(message)

    async def _body(self, message: Message) -> None:
        if self._held is not None:
            context = self.context
            failure = context.failure if context is not None and not context.delivered else None
            if failure is not None and failure.kind in _STATUS_BEFORE_STREAM:
                await self.fail(failure)
                return
            held, self._held = self._held, None
            self._passing = not self.explain
            if (cycle := self._scope.get(CYCLE)) is not None and self._passing:
                with _one_write(cycle):
                    await self._begin(held)
                    await self._send(message)
                return
            await self._begin(held)
        last = not message.get("more_body", False)
        if last and self._streaming and self.explain and (phases := self._phases_ms()):
            told = {f"{name}_ms": phase_ms for name, phase_ms in phases.items()}
            comment = f": baton {json.dumps(told)}\n\n".encode()
            message = {**message, "body": message.get("body", b"") + comment}
        await self._send(message)

    async def _begin(self, message: Message) -> None:
        """Send the start of an answer, with what every answer carries."""
        headers: list[Header] = list(message.get("headers", ()))
        names = {name.lower(): value for name, value in headers}
        self.length_bytes = int(names.get(b"content-length", b"0"))
        every = self._headers_of(self.asked)
        headers += [(name, value) for name, value in every if name not in names or name == b"vary"]
        if self.context is not None and self.context.bill is not None:
            headers += rate_headers(self.context.bill.standing, self._scope["path"])
            if self.context.failure is not None and self.context.failure.code == "insufficient_quota":
                # OpenAI's client would try twice more.
                headers.append((b"x-should-retry", b"false"))
        if self._retiring():
            headers.append((b"connection", b"close"))
        if message["status"] in _RETRY_STATUSES and b"retry-after" not in names:
            failure = None if self.context is None else self.context.failure
            advice_s = failure.retry_after_s if failure is not None else None
            headers.append((b"retry-after", whole_seconds(advice_s or self._retry_after_s)))
        self.begun, self.status = True, int(message["status"])
        await self._send({**message, "headers": headers})

    def _phases_ms(self) -> dict[str, float]:
        return {} if self.context is None else phases_ms(self.context)


class _Kept:
    """Stands where the transport of an answer was. What else is done with that is done by its connection."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def flush(self) -> None:
        if self.pieces:
            self._transport.write(b"".join(self.pieces))
            self.pieces = []

    def close(self) -> None:
        self.flush()
        self._transport.close()


@contextmanager
def _one_write(cycle: Any) -> Iterator[None]:
    """What an answer writes meanwhile leaves at once: each write is a call of the kernel and wakes the client."""
    transport = cycle.transport
    kept = cycle.transport = _Kept(transport)
    try:
        yield
    finally:
        cycle.transport = transport
        kept.flush()


def error_content(status: HTTPStatus, message: str, path: str, code: str = "") -> bytes:
    """The body of an error, as the clients of ``path`` expect it. ``code``: OpenAI's, where it has one."""
    if "/v1/messages" in path:
        kind = _ANTHROPIC_TYPES.get(status, status.phrase) if code or status in _KEY_STATUSES else status.phrase
        body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": message}}
    else:
        kind = _OPENAI_TYPES.get(code, status.phrase)
        body = {"error": {"message": message, "type": kind, "param": None, "code": code or int(status)}}
    return json.dumps(body).encode()


def error_headers(content: bytes) -> list[Header]:
    """The headers of an error with this body."""
    return [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]


def whole_seconds(seconds: float) -> bytes:
    """As Retry-After says them."""
    return str(max(1, math.ceil(seconds))).encode()
