"""The whole configuration tree, which every process gets, and the launcher's part of it. Holds values only."""

from __future__ import annotations

from typing import Annotated

import msgspec

from decode_worker.config import DecodeWorkerConfig
from engine.config import EngineConfig
from front_proxy.config import LIMITS, FrontProxyConfig
from prefill_worker.config import PrefillWorkerConfig
from runtime.bounds import Positive
from scheduler.config import SchedulerConfig
from worker.config import WorkerConfig
from worker.limits import WorkerLimits

Processes = Annotated[int, msgspec.Meta(ge=1, le=512)]
Schedulers = Annotated[int, msgspec.Meta(ge=1, le=2)]
Restarts = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Lines = Annotated[int, msgspec.Meta(ge=0, le=10_000)]


class LauncherConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton up` starts, and how patient it is."""

    prefill: Processes = 1
    """Prefill workers."""
    decode: Processes = 1
    """Decode workers."""
    schedulers: Schedulers = 1
    """Schedulers. Of two, one leads and the other stands by until it is needed. scheduler.port, where it is set, is the
    first one's; the second takes the next."""
    front_proxies: Processes = 1
    """Front proxies. The first takes front_proxy.port; the others take any free port."""
    state_dir: str = ".baton"
    """Where `baton up` keeps its state file, the resolved configuration and the logs."""
    demo_cache_dir: str = ""
    """Where a copy of the demo model is put. Empty: it is served from where Baton is installed."""
    start_timeout_s: Positive = 900.0
    """Time all processes together may take to become ready."""
    stop_timeout_s: Positive = 15.0
    """Time the front proxies get to end, then the workers, then the scheduler; who is late is killed."""
    stop_starting_timeout_s: Positive = 3.0
    """The same for a process that is not ready yet: it holds nothing, and a loading engine does not listen."""
    progress_interval_s: Positive = 5.0
    """How often waiting is told while processes start."""
    log_tail_lines: Lines = 30
    """Lines of a failed process's log that are shown."""
    restart_backoff_min_s: Positive = 0.5
    """Pause before a process that died is started again; it doubles with each death within restart_window_s."""
    restart_backoff_max_s: Positive = 30.0
    """Longest such pause."""
    restarts_max: Restarts = 5
    """Deaths of one process within restart_window_s after which it is started again; one more and it stays down."""
    restart_window_s: Positive = 600.0
    """How long a death counts."""
    group_exit_timeout_s: Positive = 3.0
    """Time that what a process started has to end behind it, and once more after it was killed."""
    last_words_timeout_s: Positive = 0.2
    """Time for which the stdout of a process that has ended is read on."""
    exit_timeout_s: Positive = 15.0
    """Time a process has to be gone once its work has ended; then it ends itself hard, so that it is started again."""
    hub_timeout_s: Positive = 10.0
    """Time the model hub has to say whether it knows the model, before anything is started."""
    first_check_timeout_s: Positive = 10.0
    """Time the first front proxy has to answer /health once everything is ready."""
    status_timeout_s: Positive = 2.0
    """Time a process has to answer `baton status`, and the launcher where it asks."""
    look_interval_s: Positive = 0.1
    """How often a scheduler that came back in a restart is asked whether the workers have found it."""

    def __post_init__(self) -> None:
        if self.restart_backoff_max_s < self.restart_backoff_min_s:
            raise ValueError("restart_backoff_max_s must not be less than restart_backoff_min_s")


class BatonConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything Baton can be told."""

    engine: EngineConfig = EngineConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    worker: WorkerConfig = WorkerConfig()
    prefill_worker: PrefillWorkerConfig = PrefillWorkerConfig()
    decode_worker: DecodeWorkerConfig = DecodeWorkerConfig()
    front_proxy: FrontProxyConfig = FrontProxyConfig()
    launcher: LauncherConfig = LauncherConfig()

    def __post_init__(self) -> None:
        lease_min_s = 2 * LIMITS.handoff_renew_interval_s
        if self.prefill_worker.lease_s < lease_min_s:
            raise ValueError(
                f"prefill_worker.lease_s must be at least {lease_min_s:g}: a lease must outlive one lost renewal"
            )
        # Twice: the bytes of a step are estimated, and what does not fit ends the stream with all its requests.
        bytes_min = 2 * WorkerLimits().step_bytes_max
        assert bytes_min <= LIMITS.message_bytes_max, "a step's outputs are one message"
