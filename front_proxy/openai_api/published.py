"""vLLM's app as a front proxy serves it: some of its routes, matched by its own router. Reads no request's body."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI
from starlette.responses import Response
from starlette.routing import Match

from front_proxy.gateway.metrics import REFUSALS
from front_proxy.openai_api import http_metrics
from front_proxy.openai_api.answer import Receive, Scope, Send, error_content
from front_proxy.openai_api.answer_headers import AnswerHeaders
from front_proxy.openai_api.fast_path.fast_path import FastPath

GENERATION_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
OPERATOR_ROUTES = frozenset({"/metrics", "/load"})
"""Not served where operators have a port of their own."""
# By the path under which vLLM registers them. docs/protocol.md says what becomes of the others.
ROUTES = (
    GENERATION_ROUTES
    | OPERATOR_ROUTES
    | {
        "/v1/models",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/ping",
        "/version",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
        "/static",
    }
)
_PATH_CHARACTERS_MAX = 200


class PublishedApp:
    """An ASGI app: ``app`` without the routes that are not served. Its middleware for headers is in ``headers``."""

    def __init__(self, app: FastAPI) -> None:
        self.fastapi = app
        self.fast_path: FastPath | None = None
        self.state = app.state
        self.headers = AnswerHeaders(app)
        http_metrics.take_over(app)
        paths = {getattr(route, "path", "") for route in app.router.routes}
        self.unpublished = sorted(paths - ROUTES)
        """Paths that ``app`` had and that are not served."""
        kept = [route for route in app.router.routes if getattr(route, "path", "") in ROUTES]
        # A request is compared with one route after the other, here and by the router; no two routes
        # match the same request, so the order is free, and the paths that matter come first.
        app.router.routes[:] = sorted(kept, key=lambda route: route.path not in GENERATION_ROUTES)
        app.router.default = self.no_route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As vLLM's app answers."""
        await self.fastapi(scope, receive, send)

    def route(self, scope: Scope) -> str:
        """The registered path of the route that takes this request. Empty: none does, and the app says why."""
        scope["root_path"] = self.fastapi.root_path or scope.get("root_path", "")
        for route in self.fastapi.router.routes:
            if route.matches(scope)[0] is Match.FULL:
                return route.path
        return ""

    async def no_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer that nothing is served at this path."""
        REFUSALS.labels("no_route").inc()
        served = {route.path for route in self.fastapi.router.routes}
        paths = ", ".join(sorted(served - OPERATOR_ROUTES))
        message = f"There is no route {scope['path'][:_PATH_CHARACTERS_MAX]} here. These are: {paths}."
        content = error_content(HTTPStatus.NOT_FOUND, message, scope["path"])
        await Response(content, HTTPStatus.NOT_FOUND, media_type="application/json")(scope, receive, send)
