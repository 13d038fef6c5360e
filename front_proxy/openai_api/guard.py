"""The ASGI layer around vLLM's app: places, bounds, dropped fields, and one way out for every answer. Knows no vLLM."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

from accounts.key_table import KeyScope
from front_proxy.config import LIMITS, FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.access import OPEN, Access
from front_proxy.gateway.identity import caller
from front_proxy.gateway.in_flight import InFlight
from front_proxy.gateway.metrics import DROPPED_FIELDS, REFUSALS
from front_proxy.gateway.request_context import CLOCK, REQUEST_CONTEXT, RequestContext
from front_proxy.gateway.turns import Turns
from front_proxy.openai_api import http_metrics
from front_proxy.openai_api.answer import CYCLE, Answer, Header, Message, Receive, Scope, Send
from front_proxy.openai_api.published import GENERATION_ROUTES, OPERATOR_ROUTES, PublishedApp
from front_proxy.openai_api.uploads import BodyRefused, ClientLeft, Uploads
from runtime.failures import FailureError
from runtime.unique import new_id

CROWDED = "baton.crowded"
"""In the scope of a request on a connection that is one too many."""
CROWDED_ROUTES = frozenset({"/health", "/ping", "/metrics"})
"""Answered there too."""
OPEN_ROUTES = frozenset({"/health", "/ping"})
"""Answered without a key where keys are required."""
SCOPES: dict[str, KeyScope] = dict.fromkeys(
    (*GENERATION_ROUTES, "/v1/messages/count_tokens", "/tokenize", "/detokenize"), "inference"
)
SCOPES["/v1/usage"] = "usage:own"
"""What a key must allow; of other routes nothing."""
NO_ROOM = "This front proxy has no room for more connections. Please try again later."
EXPLAIN_HEADER = b"x-baton-explain"
"""When it is 1, the answer says where the time to its first token went."""
REQUEST_ID_HEADER = b"x-request-id"
REQUEST_ID_FIELD = b'"request_id"'
"""In a body it may be the request's id, which the header would replace."""
FORBIDDEN_HEADERS = frozenset({b"x-data-parallel-rank"})
FORBIDDEN_FIELDS = ("kv_transfer_params", "ec_transfer_params")


class HttpGuard:
    """Wraps the app. A generation takes its place in ``in_flight`` once its body is here."""

    def __init__(
        self,
        app: PublishedApp,
        config: FrontProxyConfig,
        in_flight: InFlight,
        limits: FrontProxyLimits = LIMITS,
        access: Access = OPEN,
    ) -> None:
        self._access = access
        self._app = app
        self._config = config
        self._in_flight = in_flight
        self._limits = limits
        self._uploads = Uploads(config.request_bytes_max, limits)
        self._turns = Turns()
        self.retiring = False
        """Set: every response tells its client to close the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the life of the app. Whatever answers, answers by ``Answer``."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer(
            send,
            scope,
            self._app.headers.of,
            retry_after_s=self._limits.retry_after_s,
            retiring=lambda: self.retiring,
        )
        began_s = CLOCK.monotonic_s()
        try:
            await self._answer(scope, receive, answer)
        except Exception:
            if not answer.begun:
                message = "The request failed inside the front proxy; its log says why."
                await answer.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, message)
            raise  # to the server, which logs it
        finally:
            http_metrics.observe(answer, scope, CLOCK.monotonic_s() - began_s)

    async def _answer(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        if (preflight := self._app.headers.preflight(scope)) is not None:
            await preflight(scope, receive, answer.send)
            return
        route = answer.route = self._app.route(scope)
        if self._config.metrics_port and route in OPERATOR_ROUTES:
            await self._app.no_route(scope, receive, answer.send)
            return
        if CROWDED in scope and route not in CROWDED_ROUTES:
            REFUSALS.labels("descriptors").inc()
            await answer.refuse(HTTPStatus.SERVICE_UNAVAILABLE, NO_ROOM)
            return
        gate = None if route in OPEN_ROUTES else self._access.gate
        try:
            who = caller(scope["headers"], self._config.classes_allowed, gate, SCOPES.get(route))
            context = RequestContext(who, None)
            if route in GENERATION_ROUTES:
                self._in_flight.check()
                context.bill = self._access.bill_of(who, route)
        except FailureError as error:
            await answer.fail(error.failure)
            return
        if route == "/openapi.json":
            # A second of work the first time. In a thread, streams go on meanwhile.
            await asyncio.to_thread(self._app.fastapi.openapi)
        try:
            await self._forward(context, route, scope, receive, answer)
        finally:
            if context.place is not None:
                context.place.leave()
            if self._access.bills is not None:
                answered = answer.begun and answer.status == HTTPStatus.OK
                context.close_bill(self._access.bills, answered=answered)

    async def _forward(
        self, context: RequestContext, route: str, scope: Scope, receive: Receive, answer: Answer
    ) -> None:
        answer.context = context
        headers: list[Header] = []
        length = 0
        body: bytes | None = None
        for name, value in scope["headers"]:
            if name in FORBIDDEN_HEADERS:
                DROPPED_FIELDS.labels(name.decode()).inc()
                continue
            if name == EXPLAIN_HEADER:
                answer.explain = value.strip() in (b"1", b"true")
            elif name == b"content-length" and value.isdigit():
                length = int(value)
            headers.append((name, value))
        if route and scope["method"] == "POST":
            address, _ = scope.get("client") or ("", 0)
            try:
                cycle = scope.get(CYCLE)
                here = cycle is not None and not cycle.more_body
                body = await self._uploads.read(receive, address, length, here=here)
                if route in GENERATION_ROUTES:
                    context.place = self._in_flight.enter()
            except ClientLeft:
                return
            except BodyRefused as why:
                REFUSALS.labels(why.reason).inc()
                # The rest of the body was not read and is not worth reading.
                await answer.refuse(why.status, str(why), close=True)
                return
            except FailureError as error:
                await answer.fail(error.failure)
                return
            if route in GENERATION_ROUTES:
                await self._turns.begin()
                if REQUEST_ID_FIELD not in body:
                    headers = answer.asked = _with_request_id(headers)
            body = _without_forbidden_fields(body)
            headers = [
                (name, str(len(body)).encode() if name == b"content-length" else value) for name, value in headers
            ]
        scope = {**scope, "headers": headers}
        token = REQUEST_CONTEXT.set(context)
        try:
            fast = self._app.fast_path
            if body and fast is not None and await fast.answers(route, body, scope, receive, answer.send):
                return
            await self._app(scope, _replay(body, receive) if body is not None else receive, answer.send)
        finally:
            REQUEST_CONTEXT.reset(token)


def _with_request_id(headers: list[Header]) -> list[Header]:
    """With an id for a request that has none: then its answer, vLLM, the log and the scheduler have the same one."""
    if any(name == REQUEST_ID_HEADER for name, _ in headers):
        return headers
    return [*headers, (REQUEST_ID_HEADER, new_id().encode())]


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
        # One that is of another type is left to vLLM, which refuses it.
        dropped = [name for name in FORBIDDEN_FIELDS if name in value and isinstance(value[name], dict | None)]
        for name in dropped:
            del value[name]
        cleaned = json.dumps(value).encode() if dropped else body
    except (ValueError, RecursionError):
        return body  # vLLM's own words for malformed or too deeply nested JSON
    for name in dropped:
        DROPPED_FIELDS.labels(name).inc()
    return cleaned
