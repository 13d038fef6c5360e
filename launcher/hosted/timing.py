"""The launcher's waits and bounds that are no settings. Tests hand in others."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    stop_starting_timeout_s: float = 3.0
    """Time that a process which is not ready has to end. It has no requests to finish."""
    progress_interval_s: float = 5.0
    """How often start-up reports what it waits for."""
    log_tail_lines: int = 30
    """Lines of a failed process's log that are shown."""
    restarts_max: int = 5
    """Times that one process is started again within ``restart_window_s``; after one more death it stays down."""
    restart_backoff_min_s: float = 0.5
    """Pause before a process that died is started again; doubles with each death in the window."""
    restart_backoff_max_s: float = 30.0
    """Longest such pause, if more restarts are allowed."""
    restart_window_s: float = 600.0
    """How long a death counts."""
    status_timeout_s: float = 2.0
    """Time that a process has to answer for its status."""
    poll_interval_s: float = 0.1
    """How often a restarted scheduler is asked whether the workers have registered."""
