"""Settings of the core that both kinds of workers share. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec

from runtime.bounds import LogLevel, NonNegative, Port, Positive, PositiveCount


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process, whatever its role. Units are in the names."""

    worker_id: str = ""
    """Unique in the cluster and stable over restarts. Empty: ``<role>-<pid>``."""
    host: str = "127.0.0.1"
    """Interface the gRPC and metrics servers bind, and the address others are told unless ``advertise_host`` is set."""
    advertise_host: str = ""
    """Host others reach this worker by. Empty: ``host``."""
    port: Port = 0
    """gRPC port. 0: any free one."""
    advertise_port: Port = 0
    """gRPC port others reach this worker by, where something forwards to ``port``. 0: ``port``."""
    metrics_port: Port = 0
    """Prometheus port. 0: any free one."""
    scheduler_address: str = ""
    """host:port of the scheduler, or of several with commas between them, of which one leads.
    Empty: none, the worker serves whoever connects (tests)."""

    message_bytes_max: PositiveCount = 64 * 1024 * 1024
    """Largest gRPC message in either direction."""
    front_proxies_max: PositiveCount = 64
    """Attach streams at once."""
    lease_tick_s: Positive = 0.25
    """How often leases are looked through for ones that ran out."""
    requests_max: PositiveCount = 256
    """Requests admitted at once; more are refused as exhausted."""
    outbox_deltas_max: PositiveCount = 65_536
    """Deltas waiting for one front proxy; one more and its stream is cut and its requests aborted."""
    outbox_bytes_max: PositiveCount = 64 * 1024 * 1024
    """Bytes of deltas waiting for one front proxy; the same happens beyond."""
    step_deltas_max: PositiveCount = 1_024
    """Deltas in one StepOutputs message; more become several messages."""
    step_bytes_max: PositiveCount = 8 * 1024 * 1024
    """Bytes aimed at in one StepOutputs message."""
    output_interval_ms: NonNegative = 20.0
    """Tokens that come within this time of the message before travel together: nobody reads 50 pieces a second.
    0: every step at once. First tokens, ends and failures never wait, and engines whose steps take longer than this
    are not slowed at all."""
    retry_after_min_s: Positive = 2.0
    """Least estimate in a refusal for lack of room (Retry-After): when there is room again at the pace at which
    requests end. Half of it more or less is told, by chance, so that refused requests do not come back together."""
    retry_after_max_s: Positive = 40.0
    """Largest such estimate."""

    heartbeat_interval_s: Positive = 1.0
    """Longest silence towards the scheduler, where it does not ask for a shorter one."""
    load_interval_s: Positive = 0.1
    """Shortest time between two load reports."""
    leases_named_max: PositiveCount = 64
    """Leases named to the scheduler at a heartbeat, the oldest first, so that it can tell which request leaked."""
    scheduler_backoff_initial_s: Positive = 0.1
    """First wait after the scheduler's session broke."""
    scheduler_backoff_max_s: Positive = 2.0
    """Longest wait between attempts to reach the scheduler. It never gives up."""
    scheduler_call_timeout_s: Positive = 10.0
    """Time the scheduler has to answer a registration; one of several has 2 s."""
    register_timeout_s: Positive = 120.0
    """Time a starting worker may wait for its first registration."""

    drain_timeout_s: NonNegative = 30.0
    """Time running requests and held leases get when the worker is told to stop."""
    health_interval_s: Positive = 1.0
    """How often the engine is asked whether it lives."""
    engine_stall_timeout_s: NonNegative = 120.0
    """Time an engine whose process lives may end no step and answer no ping, before the worker ends so that it is
    started again. Longer than its longest single step: one chunk of a prompt (``engine.max_num_batched_tokens``), with
    whatever is compiled at its first use, but no whole prompt and no pull. What runs there has gone on elsewhere
    before (``front_proxy.*_stall_*``). vLLM's own bound for a step over several GPUs is 300 s. 0: it is never ended."""
    abort_timeout_s: Positive = 10.0
    """Time the engine gets to take back one request or one lease."""
    stop_grace_s: NonNegative = 2.0
    """Time the gRPC server gets to close its streams."""
    engine_close_timeout_s: NonNegative = 30.0
    """Time the engine gets to close."""
    log_level: LogLevel = "info"
    """Lines of this level and above are logged."""

    def __post_init__(self) -> None:
        if self.retry_after_max_s < self.retry_after_min_s:
            raise ValueError("retry_after_max_s must not be less than retry_after_min_s")
        if self.scheduler_backoff_max_s < self.scheduler_backoff_initial_s:
            raise ValueError("scheduler_backoff_max_s must not be less than scheduler_backoff_initial_s")
