"""Metrics of the serving layers: what was refused, dropped, and how long rendering took. Decides nothing."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from runtime.buckets import PHASE_S

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
RENDER_S = Histogram(
    "baton_front_proxy_render_seconds",
    "Request received to first sequence handed to the dispatcher: reading, tokenising, validating.",
    buckets=PHASE_S,
)
GRPC_STREAMS = Gauge(
    "baton_front_proxy_grpc_streams",
    "Open calls of the public gRPC service.",
    ["method"],
)
