"""The headers of every answer: what lets browsers of other origins read it, and its request id. Sends nothing."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware

from runtime.unique import new_id

# A script of another origin reads only these and a few that are always readable.
_EXPOSED = b"Retry-After, Server-Timing, X-Request-Id"


class AnswerHeaders:
    """What the options of `vllm serve` ask for. vLLM's own layers stand too far inside to see every answer."""

    def __init__(self, app: FastAPI) -> None:
        """Those of ``app``'s own layers, which leave the app: each answer would get them twice."""
        layers = {layer.cls: layer for layer in app.user_middleware}
        cors, ids = layers.pop(CORSMiddleware, None), layers.pop(XRequestIdMiddleware, None)
        app.user_middleware[:] = [layer for layer in app.user_middleware if layer is not cors and layer is not ids]
        app.middleware_stack = None  # built anew at the first request
        self._cors = None if cors is None else CORSMiddleware(app, **cors.kwargs)
        self._request_ids = ids is not None

    def of(self, asked: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Those of the answer to a request with the headers ``asked``."""
        headers = Headers(raw=list(asked))
        said = []
        if self._request_ids:
            asked_id = headers.get("x-request-id")
            said.append((b"x-request-id", (new_id() if asked_id is None else asked_id).encode("latin-1")))
        if (rules := self._cors) is None:
            return said
        said.append((b"vary", b"Origin"))
        origin = headers.get("origin")
        if origin is not None and rules.is_allowed_origin(origin):
            allowed = origin.encode("latin-1") if rules.preflight_explicit_allow_origin else b"*"
            said.append((b"access-control-allow-origin", allowed))
            said.append((b"access-control-expose-headers", _EXPOSED))
            if rules.allow_credentials:
                said.append((b"access-control-allow-credentials", b"true"))
        return said

    def preflight(self, scope: MutableMapping[str, Any]) -> Response | None:
        """The answer to a browser that asks whether it may ask, for any path. None: ``scope`` asks something else."""
        if self._cors is None or scope["method"] != "OPTIONS":
            return None
        asked = Headers(raw=scope["headers"])
        if "origin" not in asked or "access-control-request-method" not in asked:
            return None
        return self._cors.preflight_response(request_headers=asked)
