"""Settings of a worker, whatever its role. Holds values and bounds; never reads files."""

from __future__ import annotations

import msgspec

from runtime.bounds import LogLevel, NonNegative, Port, PositiveCount


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may choose. Units are in the names; ``WorkerLimits`` has the rest."""

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
