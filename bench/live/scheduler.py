"""A scheduler process whose core is recorded: ``python -m bench.live.scheduler FILE SEED [KEY=VALUE ...]``.

All else is what `baton scheduler` runs, but for the seed, and the planner of tenants that ask for another one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.live.planners import ByTenant
from bench.live.recording import Header, RecordedCore
from launcher.config import BatonConfig
from launcher.run_process import EXIT_TIMEOUT_S, announce
from runtime.configuration import load
from runtime.process import lifecycle, logs, orphan
from runtime.timing.clock import Clock
from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.config import SchedulerConfig, SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.run import run


def serve(file: Path, seed: int, sets: Sequence[str]) -> None:
    """Run it to its end."""
    config = load(BatonConfig, file=None, environ=os.environ, sets=sets).value.scheduler
    logs.configure_logging(config.log_level, "scheduler")
    with file.open("wb") as recording:

        def make_core(config: SchedulerConfig, clock: Clock, profile: LatencyProfile) -> SchedulerCore:
            header = Header(
                seed=seed, began_s=clock.monotonic_s(), config=SchedulerParameters.of(config), profile=profile
            )
            return RecordedCore(header, ByTenant, recording)

        lifecycle.run(run(config, announce, make_core=make_core), exit_timeout_s=EXIT_TIMEOUT_S)


if __name__ == "__main__":
    orphan.stop_with_parent()
    serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
