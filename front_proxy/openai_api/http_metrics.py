"""The metrics of HTTP that `vllm serve` has, under the same names, once for each answer. Reads no body."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware

from front_proxy.gateway import metrics
from front_proxy.openai_api.answer import Answer, Scope

_UNCOUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version"})


def take_over(app: FastAPI) -> None:
    """Leave out the layer of ``app`` that counts, which looks at every chunk."""
    counting = PrometheusInstrumentatorMiddleware
    app.user_middleware[:] = [layer for layer in app.user_middleware if layer.cls is not counting]
    app.middleware_stack = None  # built anew at the first request


def observe(answer: Answer, scope: Scope, duration_s: float) -> None:
    """An answer has ended. It has no status if its client left before there was one."""
    if answer.route in _UNCOUNTED or not answer.status:
        return
    said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    status = f"{answer.status // 100}xx"
    requests, sizes_in, sizes_out, durations = _children(answer.route or "none", scope["method"], status)
    requests.inc()
    sizes_in.observe(int(said) if said.isdigit() else 0)
    sizes_out.observe(answer.length_bytes)
    durations.observe(duration_s)
    metrics.HTTP_DURATION_MANY_S.observe(duration_s)


# A method is the client's own word, so there may be any number of them.
@functools.lru_cache(maxsize=256)
def _children(handler: str, method: str, status: str) -> tuple[Any, Any, Any, Any]:
    return (
        metrics.HTTP_REQUESTS.labels(method, status, handler),
        metrics.HTTP_REQUEST_BYTES.labels(handler),
        metrics.HTTP_RESPONSE_BYTES.labels(handler),
        metrics.HTTP_DURATION_S.labels(method, handler),
    )
