"""The metrics of HTTP that `vllm serve` has, under the same names, once for each answer. Reads no body."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI
from prometheus_client import Counter, Histogram, Summary
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware

from front_proxy.openai_api.answer import Answer, Scope

_UNCOUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version"})
_MANY_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)
_REQUESTS = Counter(
    "http_requests_total", "Requests answered, by method, status and route.", ["method", "status", "handler"]
)
_REQUEST_BYTES = Summary("http_request_size_bytes", "Length that a request said its body has.", ["handler"])
_RESPONSE_BYTES = Summary(
    "http_response_size_bytes", "Length that an answer said its body has; 0 of a stream.", ["handler"]
)
_DURATION_S = Histogram(
    "http_request_duration_seconds", "Time to the end of an answer.", ["method", "handler"], buckets=(0.1, 0.5, 1)
)
_DURATION_MANY_S = Histogram(
    "http_request_duration_highr_seconds", "Time to the end of an answer, in many buckets.", buckets=_MANY_S
)


def take_over(app: FastAPI) -> None:
    """Leave out the layer of ``app`` that counts, which looks at every chunk."""
    counting = PrometheusInstrumentatorMiddleware
    app.user_middleware[:] = [layer for layer in app.user_middleware if layer.cls is not counting]
    app.middleware_stack = None  # built anew at the first request


def observe(answer: Answer, scope: Scope, duration_s: float) -> None:
    """An answer has ended. One without a status is that to a client which left."""
    if answer.route in _UNCOUNTED:
        return
    said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    status = f"{(answer.status or 500) // 100}xx"
    requests, sizes_in, sizes_out, durations = _children(answer.route or "none", scope["method"], status)
    requests.inc()
    sizes_in.observe(int(said) if said.isdigit() else 0)
    sizes_out.observe(answer.length_bytes)
    durations.observe(duration_s)
    _DURATION_MANY_S.observe(duration_s)


# A method is the client's own word, so there may be any number of them.
@functools.lru_cache(maxsize=256)
def _children(handler: str, method: str, status: str) -> tuple[Any, Any, Any, Any]:
    return (
        _REQUESTS.labels(method, status, handler),
        _REQUEST_BYTES.labels(handler),
        _RESPONSE_BYTES.labels(handler),
        _DURATION_S.labels(method, handler),
    )
