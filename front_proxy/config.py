"""Settings of a front proxy: addresses, bounds and deadlines. Holds values only."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from runtime.bounds import Count, LogLevel, NonNegative, Port, Positive, PositiveCount

# The end of the plan a request has, and the question for its next one: it has one at a time.
MESSAGES_A_TURN = 2


class ServingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM's serving layer is told. The names are those of `vllm serve`; the model itself is the engine's."""

    served_model_name: list[str] = msgspec.field(default_factory=list)
    """Names clients may use; the first one is put into answers. Empty: the engine's name, else its model path."""
    chat_template: str | None = None
    """A file or a template. Unset: the tokenizer's own."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    tool_call_parser: str | None = None
    """How tool calls are read from the model's text, such as `hermes`. Unset: requests may not leave the choice to the
    model."""
    enable_auto_tool_choice: bool | None = None
    """Whether the model may choose to call a tool. Unset: where tool_call_parser is set."""
    reasoning_parser: str | None = None
    """How reasoning is told from the answer. Workers need it too where grammars start after the reasoning."""
    return_tokens_as_token_ids: bool = False
    """Show `token_id:N` in place of text in log probabilities."""
    enable_prompt_tokens_details: bool = True
    """Put cached tokens into usage."""
    enable_request_id_headers: bool = True
    """Answer with X-Request-Id."""
    enable_force_include_usage: bool = False
    """Usage on every stream, asked for or not."""
    sse_keep_alive_interval_s: Count = 0
    """Comment lines on an idle stream every so many seconds. 0: none."""
    allowed_origins: list[str] = msgspec.field(default_factory=list)
    """Origins that browsers may call from. Empty: none."""
    extra_routes: list[str] = msgspec.field(default_factory=list)
    """Further paths of vLLM's app to publish, such as /docs. Everything else answers 404."""
    keep_alive_timeout_s: Count = 5
    """An idle HTTP connection is closed after this time."""
    log_level: LogLevel = "warning"
    """Of the HTTP server."""
    access_log: bool = False
    extra_args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Any further option of `vllm serve` that concerns serving: {"default_chat_template_kwargs": {"k": 1}}."""


class FrontProxyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Every bound carries its unit in its name. Durations ending in ``_s`` are seconds."""

    host: str = "127.0.0.1"
    port: Port = 8000
    """HTTP (OpenAI's API and /metrics). 0 picks a free port."""
    grpc_port: Port = 0
    """inference.v1, health and status. 0 picks a free port."""
    front_proxy_id: str = ""
    """Unique per process. Empty: made from host, pid and start time."""
    scheduler_address: str = ""
    """host:port of the scheduler, or of several with commas between them, of which one leads."""

    requests_in_flight_max: PositiveCount = 1024
    """Generations running at once, children of n > 1 counted; more are refused with EXHAUSTED."""
    request_bytes_max: PositiveCount = 32 * 1024 * 1024
    """Longest HTTP body accepted."""
    request_body_timeout_s: Positive = 60.0
    """Time a client may take to send its body; a stalled upload must not hold a place for a request."""
    client_send_timeout_s: Positive = 60.0
    """Time an HTTP client may leave its answer unread, once the buffers on the way are full, before its connection is
    ended and its request given up: it holds a place and memory of workers meanwhile."""
    prompt_tokens_max: PositiveCount = 1_048_576
    """Longest prompt accepted before any worker is asked; the workers' own limit is checked too."""
    name_characters_max: PositiveCount = 1024
    """Longest request_id, session_id and cache_salt of a request, over gRPC its tenant too: they are kept, logged and
    sent on with every message. Of a request_id over HTTP what is put before it (``chatcmpl-``) counts."""
    message_bytes_max: PositiveCount = 64 * 1024 * 1024
    """Longest gRPC message in either direction."""
    output_deltas_max: PositiveCount = 4096
    """Deltas waiting for one slow client; beyond it the request fails rather than holding memory."""
    output_bytes_max: PositiveCount = 16 * 1024 * 1024
    """Bytes of output waiting on one GenerateMany stream whose client reads slowly; beyond it, its requests wait."""
    send_messages_max: PositiveCount = 8192
    """Messages waiting to be written on one stream to a worker or the scheduler; more end it. More than twice
    ``requests_in_flight_max``: all at once may end the plan they have and ask for the next one."""

    deadline_s: Positive = 600.0
    """Time a request may take when the client named none, and the most it may name."""
    attempts_max: PositiveCount = 3
    """Placements tried in a row for one request, without anything new for its client or a replay that got further than
    those before it, before it fails."""
    resumes_max: Count = 8
    """Times one stream may go on after further failures with the attempts counted anew."""
    retry_budget_burst: PositiveCount = 2048
    """Retries that may follow at once, over all requests: what a dying worker ran must fit."""
    retry_budget_ratio: NonNegative = 0.5
    """Retries that each request adds to that budget."""
    retry_budget_per_s: NonNegative = 10.0
    """Retries that each second adds to that budget."""
    seed_for_replay: bool = True
    """Give a seed to requests that draw at random, have none, and cannot be continued by another engine (grammars,
    penalties over the output): then a broken stream can be computed again. Costs their engine some sampling time."""
    stream_stall_timeout_s: Positive = 10.0
    """Time a running decode may produce nothing while its worker is silent, before it goes on elsewhere."""
    stream_stall_alive_timeout_s: Positive = 60.0
    """The same while its worker produces output for others."""
    prefill_stall_timeout_s: Positive = 30.0
    """Time a prompt may take, queue included, while its worker is silent. Longer than the longest prompt takes."""
    prefill_stall_alive_timeout_s: Positive = 120.0
    """The same while its worker produces output for others."""
    handoff_stall_timeout_s: Positive = 30.0
    """Time a decode worker may take from a hand-off to its first output."""
    orphaned_pull_timeout_s: Positive = 5.0
    """The same from the moment on that the stream to the KV's holder is lost."""
    stall_check_interval_s: Positive = 0.5
    """How often all requests are looked at for this. Where this process itself stood still for as long, none counts."""
    plan_timeout_s: Positive = 5.0
    """Wait for one answer from the scheduler, reconnecting included."""
    plan_patience_s: Positive = 0.5
    """Wait for any word from a connected scheduler before a request is planned here, from the last cluster view. While
    the scheduler is away, requests that a worker failed are planned here after so long."""
    plans_told_interval_s: Positive = 10.0
    """How often the scheduler is told all that runs here, so that it drops what it reserved for nothing."""
    degraded_view_max_age_s: NonNegative = 300.0
    """Age of the last cluster view up to which requests are planned from it while the scheduler is away. 0: none is."""
    degraded_load_fade_s: Positive = 10.0
    """Time in which the workers' load in that view loses its weight: afterwards only our own plans count."""
    connect_timeout_s: Positive = 3.0
    """Wait for a stream to a worker or the scheduler to open."""
    worker_connect_retry_s: NonNegative = 0.5
    """After a worker could not be reached, time during which it is not dialled again."""
    handoff_renew_interval_s: Positive = 5.0
    """How often the lease of a hand-off is renewed whose decode worker has not answered. A few of these must fit into
    ``prefill_worker.lease_s``."""
    scheduler_backoff_min_s: Positive = 0.05
    """First pause before a lost scheduler is dialled again; it doubles each time, less up to half by chance."""
    scheduler_backoff_max_s: Positive = 2.0
    """Longest such pause."""
    close_timeout_s: NonNegative = 5.0
    """Wait for streams to end when the front proxy stops."""
    usable_timeout_s: Positive = 600.0
    """Wait for a usable set of workers at start before giving up."""
    drain_timeout_s: NonNegative = 30.0
    """Time running requests get to finish after the first SIGTERM; a second one cuts it short."""
    drain_settle_s: NonNegative = 0.5
    """Silence after which open connections are closed at the end of a drain: before, their clients may be sending."""
    retry_after_s: NonNegative = 1.0
    """Advice in Retry-After when this process itself is full."""

    log_level: LogLevel = "info"
    """Lines of this level and above are logged; ``serving.log_level`` is the HTTP server's own."""

    phases_header: str = "x-baton-explain"
    """Request header: when set to 1, the response carries the phases of its time to first token."""

    serving: ServingConfig = ServingConfig()
    """Options of the OpenAI-compatible layer."""

    def __post_init__(self) -> None:
        if self.scheduler_backoff_max_s < self.scheduler_backoff_min_s:
            raise ValueError("scheduler_backoff_max_s must not be less than scheduler_backoff_min_s")
        if self.send_messages_max <= MESSAGES_A_TURN * self.requests_in_flight_max:
            raise ValueError(
                f"send_messages_max ({self.send_messages_max}) must be more than {MESSAGES_A_TURN} times "
                f"requests_in_flight_max ({self.requests_in_flight_max}): every new stream to the scheduler would end"
            )
