"""Settings of a front proxy, and its constants. Holds values only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from runtime.bounds import LogLevel, NonNegative, Port, Positive, PositiveCount
from runtime.priority_class import PriorityClass

# A request sends at most two messages at once: the end of its plan and the next question. 8 is four times that.
MESSAGES_PER_REQUEST_MAX = 8


class ServingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM's serving layer is told. The names are those of `vllm serve`; the model itself is the engine's."""

    chat_template: str | None = None
    """A file or a template. Unset: the tokenizer's own."""
    tool_call_parser: str | None = None
    """How tool calls are read from the model's text, such as `hermes`. Unset: requests may not leave the choice to the
    model."""
    enable_auto_tool_choice: bool | None = None
    """Whether the model may choose to call a tool. Unset: where tool_call_parser is set."""
    reasoning_parser: str | None = None
    """How reasoning is told from the answer. Workers need it too where grammars start after the reasoning."""
    allowed_origins: list[str] = msgspec.field(default_factory=list)
    """Origins that browsers may call from. Empty: none."""
    extra_args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Any further option of `vllm serve` that concerns serving: {"default_chat_template_kwargs": {"k": 1}}, or
    {"served_model_name": ["name", "alias"]} for more names than engine.served_model_name. What engines read too belongs
    in engine.args, and is refused here."""


class FrontProxyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator chooses. Durations ending in ``_s`` are seconds. FrontProxyLimits holds the rest."""

    host: str = "127.0.0.1"
    port: Port = 8000
    """HTTP (OpenAI's API). 0 picks a free port."""
    metrics_port: Port = 0
    """Port of /metrics, /livez and /readyz on the same host. 0: /metrics and /load are on ``port``, or each of several
    front proxies of one `baton up` takes a free port. `baton status` shows it."""
    grpc_port: Port = 0
    """inference.v1, health and status. 0 picks a free port."""
    tls_cert_file: str = ""
    """Certificate that clients see over HTTP and gRPC, with those between it and its CA, in PEM; read again when it
    changes. Empty: no TLS. Watch baton_certificate_expires_timestamp_seconds."""
    tls_key_file: str = ""
    """Its private key."""
    front_proxy_id: str = ""
    """Unique per process. Empty: made from host, pid and start time."""
    scheduler_address: str = ""
    """host:port of the scheduler, or of several with commas between them, of which one leads."""

    requests_in_flight_max: PositiveCount = 1024
    """Generations running at once, children of n > 1 counted; more are refused with EXHAUSTED. Watch
    baton_front_proxy_requests_in_flight and baton_front_proxy_refusals_total{reason="in_flight"}."""
    classes_allowed: Annotated[list[PriorityClass], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: list(PriorityClass)
    )
    """Priority classes that requests may ask for, by name or by a priority number. Others get 400. A request that asks
    for none is in ``default``, or in the first one of these where that is left out."""
    cache_scope: Literal["cluster", "tenant"] | None = None
    """Which prompts may reuse the same KV: all of the cluster, or those of one tenant. A tenant is what X-Baton-Tenant
    or an API key says, so more tenants mean less reuse. Unset: a tenant's, the key's team, where ``auth.mode`` is
    required, else all. Watch baton_worker_prefix_blocks."""
    request_bytes_max: PositiveCount = 32 * 1024 * 1024
    """Longest HTTP body accepted. Watch baton_front_proxy_refusals_total{reason="too_large"}."""
    deadline_s: Positive = 600.0
    """Time a request may take when the client named none, and the most it may name. Watch
    baton_front_proxy_failures_total{kind="deadline"}."""
    attempts_max: PositiveCount = 3
    """Placements tried in a row for one request before it fails. A try that brings its client something new, or a
    replay that gets further than those before it, begins the count anew. Watch baton_front_proxy_retries_total."""
    stream_stall_timeout_s: Positive = 10.0
    """Time a running decode may produce nothing while its worker is silent, before it goes on elsewhere. Watch
    baton_front_proxy_stalls_total."""
    prefill_stall_timeout_s: Positive = 30.0
    """Time a prompt may take, queue included, while its worker is silent. Longer than the longest prompt takes. Watch
    baton_front_proxy_stalls_total."""
    plan_timeout_s: Positive = 5.0
    """Wait for one answer from the scheduler, reconnecting included. Watch baton_front_proxy_plan_seconds."""
    drain_timeout_s: NonNegative = 30.0
    """Time running requests get to finish after the first SIGTERM; a second one cuts it short."""
    log_level: LogLevel = "info"
    """Lines of this level and above are logged."""

    serving: ServingConfig = ServingConfig()
    """Options of the OpenAI-compatible layer."""

    def __post_init__(self) -> None:
        if self.metrics_port and self.metrics_port in (self.port, self.grpc_port):
            raise ValueError("metrics_port must differ from port and grpc_port; 0 serves /metrics on port")

    @property
    def send_messages_max(self) -> int:
        """Messages that may wait on one stream to a worker or the scheduler; more end it.

        All requests at once may end the plan they have and ask for the next one.
        """
        return MESSAGES_PER_REQUEST_MAX * self.requests_in_flight_max


class FrontProxyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Constants of a front proxy that no operator needs to choose. Tests and the simulation hand in others."""

    # Requests and their names.
    request_body_timeout_s: float = 60.0
    """Time a client may take to send its body."""
    upload_grace_s: float = 10.0
    """Part of that time in which a body may come as slowly as it likes."""
    upload_bytes_per_s_min: int = 1024
    """Pace from then on, counted from its first byte."""
    uploads_max: int = 1024
    """Bodies on their way at once. One more ends one of them: see ``front_proxy/openai_api/uploads.py``."""
    uploads_bytes_max: int = 256 * 1024 * 1024
    """Their bytes together, or ``request_bytes_max`` if that is more."""
    client_send_timeout_s: float = 60.0
    """Time an HTTP client may leave its answer unread, once the buffers on the way are full, before its connection is
    ended: it holds a place and memory of workers meanwhile."""
    name_characters_max: int = 1024
    """Longest request_id, session_id and cache_salt of a request, over gRPC its tenant too: they are kept, logged and
    sent on with every message. Of a request_id over HTTP what is put before it (``chatcmpl-``) counts."""
    retry_after_s: float = 1.0
    """Advice in Retry-After when this process itself is full."""

    # Connections. A process that may open 1,024 files refuses HTTP connections 128 below that.
    open_files_kept: int = 64
    """Open files that no client gets: for streams to workers, and for connections that are told that there is no
    room."""
    open_files_per_grpc_connection: int = 16
    """Of so many open files one is kept for a gRPC connection. gRPC counts its own alone, so HTTP leaves them free."""
    grpc_connections_min: int = 64
    """gRPC connections at least, whatever this process may open."""
    grpc_connections_max: int = 65_536
    """gRPC connections at most."""
    crowded_connections_max: int = 32
    """HTTP connections beyond the bound that may still ask for /health; the oldest goes when there is one more."""
    crowded_timeout_s: float = 1.0
    """Time for that question; then such a connection gets 503."""
    headers_timeout_s: float = 20.0
    """Time an HTTP client may take from its connection, or from its last answer, to the end of its next headers. A
    connection on which nothing comes after an answer is closed after ``keep_alive_timeout_s``."""
    headers_bytes_max: int = 64 * 1024
    """Longest headers of a request, and longest trailers."""
    accept_pause_s: float = 0.5
    """Pause after a connection could not be accepted."""
    refusals_logged_interval_s: float = 10.0
    """Refused connections are logged once in so long, with their number."""

    # Output that waits for a slow reader.
    output_deltas_max: int = 4096
    """Deltas waiting for one slow client; beyond it the request fails rather than holding memory."""
    output_bytes_max: int = 16 * 1024 * 1024
    """Bytes of output waiting on one GenerateMany stream whose client reads slowly; beyond it, its requests wait."""

    # Retries.
    resumes_max: int = 8
    """Times one stream may go on after further failures with the attempts counted anew."""
    retry_budget_burst: int = 2048
    """Retries that may follow at once, over all requests: what a dying worker ran must fit."""
    retry_budget_ratio: float = 0.5
    """Retries that each request adds to that budget."""
    retry_budget_per_s: float = 10.0
    """Retries that each second adds to that budget."""

    # Stalls.
    stream_stall_alive_timeout_s: float = 60.0
    """As ``stream_stall_timeout_s``, while the worker produces output for others."""
    prefill_stall_alive_timeout_s: float = 120.0
    """As ``prefill_stall_timeout_s``, while the worker produces output for others."""
    handoff_stall_timeout_s: float = 30.0
    """Time a decode worker may take from a hand-off to its first output."""
    orphaned_pull_timeout_s: float = 5.0
    """As above, but measured from the loss of the stream to the worker that holds the KV."""
    stall_check_interval_s: float = 0.5
    """How often all requests are checked for this. Time in which this process was not scheduled is not counted."""

    # Plans.
    plan_patience_s: float = 0.5
    """Wait for any word from a connected scheduler before a request is planned locally, from the last cluster view.
    While the scheduler is away, requests that a worker failed are planned locally after so long."""
    plans_told_interval_s: float = 10.0
    """How often the scheduler is told all that runs here, so that it drops what it reserved for nothing."""
    degraded_view_max_age_s: float = 300.0
    """Age of the last cluster view up to which requests are planned from it while the scheduler is away."""
    degraded_load_fade_s: float = 10.0
    """Time in which the workers' load in an old view loses its weight: afterwards only our own plans count."""

    # Streams.
    message_bytes_max: int = 64 * 1024 * 1024
    """Longest gRPC message in either direction."""
    connect_timeout_s: float = 3.0
    """Wait for a stream to a worker or the scheduler to open."""
    worker_connect_retry_s: float = 0.5
    """After a worker could not be reached, time during which it is not dialled again."""
    handoff_renew_interval_s: float = 5.0
    """How often the lease of a hand-off is renewed whose decode worker has not answered. A few of these must fit into
    ``prefill_worker.lease_s``."""
    scheduler_backoff_min_s: float = 0.05
    """First pause before a lost scheduler is dialled again. It doubles each time; up to half is left out by chance."""
    scheduler_backoff_max_s: float = 2.0
    """Longest such pause."""

    # Start and end.
    usable_timeout_s: float = 600.0
    """Wait for a usable set of workers at start before giving up."""
    keep_alive_timeout_s: int = 5
    """An idle HTTP connection is closed after this time."""
    tls_handshake_timeout_s: float = 20.0
    """An HTTP client that has not begun TLS by then is sent away."""
    close_timeout_s: float = 5.0
    """Wait for streams to end when the front proxy stops."""
    drain_settle_s: float = 0.5
    """At the end of a drain, connections silent for this long are closed. Earlier, a client may still be sending."""


LIMITS = FrontProxyLimits()
