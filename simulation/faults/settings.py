"""Settings of processes in virtual time: short ones for many seeds, production's own for chaos. Holds values only."""

from __future__ import annotations

import random

import msgspec

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from runtime.rpc.grpc_server import QUICK_KEEPALIVE_TIME_MS, QUICK_KEEPALIVE_TIMEOUT_MS
from scheduler.config import PriorityClassConfig, SchedulerConfig, SchedulerParameters, WaitingConfig
from simulation.faults.fault_kinds import Faults
from worker.config import WorkerLimits

# Shorter than the front proxies' patience with a question.
_WAITING = PriorityClassConfig(wait_max_s=0.5)

SCHEDULER_CONFIG = SchedulerParameters(
    worker_lease_s=2.0,
    heartbeat_interval_s=0.5,
    silence_timeout_s=0.8,
    suspect_cooldown_s=0.5,
    recovery_grace_s=0.6,
    waiting=WaitingConfig(interactive=_WAITING, default=_WAITING, batch=_WAITING),
    missing_workers_wait_max_s=2.0,
    flip_timeout_s=0.5,
    flip_answer_s=0.5,
)
# In every other run what fits nowhere is refused, so that front proxies have to cope. Then no request waits for workers
# that a scheduler does not hear. So it must not take all of them for silent where no client may notice a failure.
REFUSING_CONFIG = msgspec.structs.replace(SCHEDULER_CONFIG, silence_timeout_s=3.0, waiting_max=0)

FRONT_CONFIG = FrontProxyConfig(
    attempts_max=3, stream_stall_timeout_s=0.4, prefill_stall_timeout_s=0.6, plan_timeout_s=1.0
)
FRONT_LIMITS = FrontProxyLimits(
    resumes_max=4,
    retry_budget_ratio=0.5,
    retry_budget_per_s=1.0,
    retry_budget_burst=100,
    stream_stall_alive_timeout_s=1.2,
    prefill_stall_alive_timeout_s=1.6,
    handoff_stall_timeout_s=0.8,
    orphaned_pull_timeout_s=0.2,
    stall_check_interval_s=0.1,
    plan_patience_s=0.3,
    degraded_load_fade_s=1.0,
    connect_timeout_s=0.3,
    worker_connect_retry_s=0.05,
    scheduler_backoff_min_s=0.02,
    scheduler_backoff_max_s=0.3,
)
BUDGET_BURST_SMALL = 2
# Long ones hide nothing that was not told at once; an old view is as good as none.
PLANS_TOLD_INTERVALS_S = (0.5, 60.0)
VIEW_MAX_AGES_S = (0.1, 60.0, 60.0)
WORKER_LIMITS = WorkerLimits(
    heartbeat_interval_s=0.25,
    scheduler_backoff_min_s=0.05,
    scheduler_backoff_max_s=0.3,
    scheduler_call_timeout_s=0.3,
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What production reads from its configuration, and how fast a virtual engine is."""

    scheduler: SchedulerConfig = SCHEDULER_CONFIG
    front: FrontProxyConfig = FRONT_CONFIG
    front_limits: FrontProxyLimits = FRONT_LIMITS
    worker_limits: WorkerLimits = WORKER_LIMITS
    lease_s: float = 0.6
    """Of the scheduler that leads."""
    keepalive_s: float = 0.3
    """How often connections to one of several schedulers are tested."""
    ranks: int = 1
    """Data-parallel ranks of each engine."""
    step_s: float = 0.01
    prompt_token_s: float = 0.001
    pull_s: tuple[float, float] = (0.002, 0.02)
    slow_pull_s: tuple[float, float] = (0.05, 0.3)


def drawn(limits: FrontProxyLimits, rng: random.Random, faults: Faults) -> FrontProxyLimits:
    """Those of one front proxy of a seeded run. One failure at a time may not be noticed, the scheduler's included."""
    return msgspec.structs.replace(
        limits,
        degraded_view_max_age_s=VIEW_MAX_AGES_S[-1] if faults.single else rng.choice(VIEW_MAX_AGES_S),
        plans_told_interval_s=rng.choice(PLANS_TOLD_INTERVALS_S),
        retry_budget_burst=BUDGET_BURST_SMALL if faults.small_budget else limits.retry_budget_burst,
    )


def production_settings() -> Settings:
    """What processes do by default, beside an engine that takes 50 ms a step."""
    return Settings(
        scheduler=SchedulerConfig(),
        front=FrontProxyConfig(),
        front_limits=FrontProxyLimits(),
        worker_limits=WorkerLimits(),
        lease_s=SchedulerConfig().kubernetes.lease_duration_s,
        keepalive_s=(QUICK_KEEPALIVE_TIME_MS + QUICK_KEEPALIVE_TIMEOUT_MS) / 2000,
        step_s=0.05,
        prompt_token_s=0.01,
        pull_s=(0.01, 0.05),
    )
