"""Bounds and intervals of a worker that no operator needs to choose. Tests and the simulation hand in others."""

from __future__ import annotations

import msgspec


class WorkerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Units are in the names."""

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
    leases_named_max: int = 64
    """Leases named to the scheduler at a heartbeat, the oldest first, so that it can tell which request leaked."""
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
