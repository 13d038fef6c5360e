"""The scheduler's settings in virtual time. Holds values only."""

from __future__ import annotations

import msgspec

from scheduler.config import PriorityClassConfig, SchedulerConfig, WaitingConfig

# Shorter than the front proxies' patience with a question.
_WAITING = PriorityClassConfig(wait_max_s=0.5)
_REFUSING = PriorityClassConfig(waiting_max=0)

SCHEDULER_CONFIG = SchedulerConfig(
    worker_lease_s=2.0,
    heartbeat_interval_s=0.5,
    suspect_cooldown_s=0.5,
    rebuild_grace_s=0.6,
    waiting=WaitingConfig(interactive=_WAITING, default=_WAITING, batch=_WAITING),
)
# In every other run what fits nowhere is refused, so that front proxies have to cope.
REFUSING_CONFIG = msgspec.structs.replace(
    SCHEDULER_CONFIG, waiting=WaitingConfig(interactive=_REFUSING, default=_REFUSING, batch=_REFUSING)
)
