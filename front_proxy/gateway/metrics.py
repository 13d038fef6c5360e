"""Metrics of the serving layers: what was refused, dropped, and how long rendering took. Decides nothing."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Summary

from runtime.buckets import PHASE_S
from runtime.late_histogram import LateHistogram

REFUSALS = Counter(
    "baton_front_proxy_refusals_total",
    "Requests refused by this process itself, before any worker was asked.",
    ["reason"],
)
DROPPED_FIELDS = Counter(
    "baton_front_proxy_dropped_fields_total",
    "Fields and headers only Baton may set that clients sent and that were dropped.",
    ["field"],
)
WAYS = Counter(
    "baton_front_proxy_answer_ways_total",
    "Chats and completions by the way they take: fast, or why they take the way through vLLM's app.",
    ["way"],
)
UNREAD_CONNECTIONS = Counter(
    "baton_front_proxy_unread_connections_total",
    "HTTP connections ended because their client left the answer unread for client_send_timeout_s.",
)
CONNECTIONS_REFUSED = Counter(
    "baton_front_proxy_connections_refused_total",
    "HTTP connections for which there was no room, and those ended before they had asked anything.",
    ["reason"],
)
SEQUENCES = Counter(
    "baton_front_proxy_sequences_total",
    "Sequences by where their first token comes from: prefill (shown at once) or decode (computed again).",
    ["first_token"],
)
RENDER_S = LateHistogram(
    "baton_front_proxy_render_seconds",
    "Request received to first sequence handed to the dispatcher: reading, tokenising, validating.",
    buckets=PHASE_S,
)
GRPC_STREAMS = Gauge(
    "baton_front_proxy_grpc_streams",
    "Open calls of the public gRPC service.",
    ["method"],
)

# Named and cut as `vllm serve` has them.
_FEW_S = (0.1, 0.5, 1)
_MANY_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)
HTTP_REQUESTS = Counter(
    "http_requests_total", "HTTP requests answered, by method, status and route.", ["method", "status", "handler"]
)
HTTP_REQUEST_BYTES = Summary("http_request_size_bytes", "Length that a request said its body has.", ["handler"])
HTTP_RESPONSE_BYTES = Summary(
    "http_response_size_bytes", "Length that an answer said its body has; 0 of a stream.", ["handler"]
)
HTTP_DURATION_S = LateHistogram(
    "http_request_duration_seconds", "Time to the end of an answer.", ["method", "handler"], buckets=_FEW_S
)
HTTP_DURATION_MANY_S = LateHistogram(
    "http_request_duration_highr_seconds", "Time to the end of an answer, in many buckets.", buckets=_MANY_S
)
