"""Settings and limits of a worker, whatever its role. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec

from runtime.bounds import LogLevel, NonNegative, Port, PositiveCount


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may choose. Units are in the names; ``WorkerLimits`` has the rest."""

    worker_id: str = ""
    """Unique in the cluster and stable over restarts. Empty: ``<role>-<pid>``."""
    host: str = "127.0.0.1"
    """Interface that the gRPC and metrics servers and NIXL's listener bind, and the address others are told unless
    ``advertise_host`` is set."""
    advertise_host: str = ""
    """Host others reach this worker by, for gRPC and for its NIXL metadata, whose port is any free one and the same on
    both sides. Nothing binds it. Empty: ``host``."""
    port: Port = 0
    """gRPC port. 0: any free one."""
    advertise_port: Port = 0
    """gRPC port others reach this worker by, where something forwards to ``port``. 0: ``port``."""
    metrics_port: Port = 0
    """Port of /metrics, /livez and /readyz. 0: any free one."""
    topology: str = ""
    """Where it runs, widest place first, such as ``zone-a/rack-3/host-7``: KV is moved between near workers where that
    is as good otherwise. Empty: not known, and as near as any."""
    scheduler_address: str = ""
    """host:port of the scheduler, or of several with commas between them, of which one leads.
    Empty: none, the worker serves every front proxy that connects (tests)."""
    requests_max: PositiveCount = 256
    """Requests admitted at once; more are refused with Retry-After. Watch ``baton_worker_refusals_total``."""
    output_interval_ms: NonNegative = 20.0
    """Tokens of so much time travel in one message. 0: a message for every engine step, for more CPU. First tokens and
    ends never wait. Watch ``baton_worker_step_messages_total``."""
    drain_timeout_s: NonNegative = 30.0
    """Time that running requests and held leases have to end when the worker is told to stop."""
    engine_stall_timeout_s: NonNegative = 120.0
    """A worker whose engine lives but ends no step and answers no ping for so long ends, and is started again.
    Must be longer than the longest single step, which computes ``engine.max_num_batched_tokens`` tokens of a prompt and
    may compile first. 0: never. Watch ``baton_worker_engine_silent_seconds``."""
    log_level: LogLevel = "info"
    """Lines of this level and above are logged."""


class WorkerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What no operator needs to choose. Units are in the names. Tests and the simulation hand in others."""

    message_bytes_max: int = 64 * 1024 * 1024
    """Largest gRPC message in either direction; at least twice ``step_bytes_max``, which is an estimate."""
    front_proxies_max: int = 64
    """Attach streams at once."""
    waiting_deltas_max: int = 65_536
    """Deltas waiting for one front proxy; with one more its stream is cut and its requests are aborted."""
    waiting_bytes_max: int = 64 * 1024 * 1024
    """Bytes of deltas waiting for one front proxy; the same happens beyond."""
    step_deltas_max: int = 1_024
    """Deltas in one StepOutputs message; more become several messages."""
    step_bytes_max: int = 8 * 1024 * 1024
    """Bytes aimed at in one StepOutputs message."""

    lease_tick_s: float = 0.25
    """How often expired leases are looked for."""
    heartbeat_interval_s: float = 1.0
    """Longest silence towards the scheduler, where it does not ask for a shorter one."""
    load_interval_s: float = 0.1
    """Shortest time between two load reports."""
    kv_growth_told: float = 0.01
    """Share of the engine's KV blocks. A load that has less than that more than the one before, and nothing else that
    is new, waits for the heartbeat: decode workers would tell of their steps ten times a second."""
    leases_named_max: int = 64
    """Leases named to the scheduler at a heartbeat, the oldest first, so that it can tell which request leaked."""
    delta_blocks_max: int = 2_048
    """KV blocks in one report to the scheduler, which takes 2 ms for them; there is one with each load report. 100,000
    blocks, after a connect, are told in 5 s."""
    scheduler_backoff_min_s: float = 0.1
    """First wait after the session with the scheduler broke."""
    scheduler_backoff_max_s: float = 2.0
    """Longest wait between two attempts to reach the scheduler. The worker never gives up."""
    scheduler_call_timeout_s: float = 10.0
    """Time the scheduler has to answer a registration."""
    other_scheduler_timeout_s: float = 2.0
    """The same where the worker knows another address to try."""
    register_timeout_s: float = 120.0
    """Time a starting worker may wait for its first registration."""

    health_interval_s: float = 1.0
    """How often the engine is asked whether it lives."""
    abort_timeout_s: float = 10.0
    """Time the engine has to take back one request or one lease."""
    stop_grace_s: float = 2.0
    """Time the gRPC server has to close its streams."""
    engine_close_timeout_s: float = 30.0
    """Time the engine has to close."""
