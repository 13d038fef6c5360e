"""Settings of processes in virtual time: short ones for many seeds, production's own for chaos. Holds values only."""

from __future__ import annotations

import msgspec

from front_proxy.config import FrontProxyConfig
from front_proxy.planning.plan_client import PlanClientLimits
from front_proxy.request.retry_policy import RetryBounds
from front_proxy.request.stall_detector import StallBounds
from runtime.grpc_server import QUICK_KEEPALIVE_TIME_MS, QUICK_KEEPALIVE_TIMEOUT_MS
from scheduler.config import PriorityClassConfig, SchedulerConfig, SchedulerParameters, WaitingConfig
from worker.limits import WorkerLimits

# Shorter than the front proxies' patience with a question.
_WAITING = PriorityClassConfig(wait_max_s=0.5)
_REFUSING = PriorityClassConfig(waiting_max=0)

SCHEDULER_CONFIG = SchedulerParameters(
    worker_lease_s=2.0,
    heartbeat_interval_s=0.5,
    silence_timeout_s=0.8,
    suspect_cooldown_s=0.5,
    recovery_grace_s=0.6,
    waiting=WaitingConfig(interactive=_WAITING, default=_WAITING, batch=_WAITING, missing_workers_wait_max_s=2.0),
)
# In every other run what fits nowhere is refused, so that front proxies have to cope. Then nobody waits for workers
# either that a scheduler does not hear, so it must not think so of all of them where nobody may notice a failure.
REFUSING_CONFIG = msgspec.structs.replace(
    SCHEDULER_CONFIG,
    silence_timeout_s=3.0,
    waiting=WaitingConfig(interactive=_REFUSING, default=_REFUSING, batch=_REFUSING),
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What production reads from its configuration, and how fast a virtual engine is."""

    scheduler: SchedulerConfig = SCHEDULER_CONFIG
    retries: RetryBounds = RetryBounds(attempts_max=3, resumes_max=4)
    stalls: StallBounds = StallBounds(
        step_s=0.4, step_alive_s=1.2, prompt_s=0.6, prompt_alive_s=1.6, pull_s=0.8, orphaned_pull_s=0.2
    )
    stall_check_interval_s: float = 0.1
    budget_ratio: float = 0.5
    budget_per_s: float = 1.0
    budget_burst: int = 100
    # None: drawn for each front proxy.
    plan_client: PlanClientLimits | None = None
    connect_timeout_s: float = 0.3
    connect_retry_s: float = 0.05
    # Of a worker that looks for the scheduler.
    backoff_min_s: float = 0.05
    backoff_max_s: float = 0.3
    lease_s: float = 0.6
    """Of the scheduler that leads."""
    keepalive_s: float = 0.3
    """How often connections to one of several schedulers are tested."""
    report_interval_s: float = 0.25
    step_s: float = 0.01
    prefill_s: tuple[float, float] = (0.01, 0.08)
    pull_s: tuple[float, float] = (0.002, 0.02)
    slow_pull_s: tuple[float, float] = (0.05, 0.3)


def production_settings() -> Settings:
    """What processes do by default, beside an engine that takes 50 ms a step."""
    front, limits = FrontProxyConfig(), WorkerLimits()
    return Settings(
        scheduler=SchedulerConfig(),
        retries=RetryBounds(attempts_max=front.attempts_max, resumes_max=front.resumes_max),
        stalls=StallBounds(
            step_s=front.stream_stall_timeout_s,
            step_alive_s=front.stream_stall_alive_timeout_s,
            prompt_s=front.prefill_stall_timeout_s,
            prompt_alive_s=front.prefill_stall_alive_timeout_s,
            pull_s=front.handoff_stall_timeout_s,
            orphaned_pull_s=front.orphaned_pull_timeout_s,
        ),
        stall_check_interval_s=front.stall_check_interval_s,
        budget_ratio=front.retry_budget_ratio,
        budget_per_s=front.retry_budget_per_s,
        budget_burst=front.retry_budget_burst,
        plan_client=PlanClientLimits(
            plan_timeout_s=front.plan_timeout_s,
            plan_patience_s=front.plan_patience_s,
            plans_told_interval_s=front.plans_told_interval_s,
            view_max_age_s=front.degraded_view_max_age_s,
            load_fade_s=front.degraded_load_fade_s,
            backoff_min_s=front.scheduler_backoff_min_s,
            backoff_max_s=front.scheduler_backoff_max_s,
        ),
        connect_timeout_s=front.connect_timeout_s,
        connect_retry_s=front.worker_connect_retry_s,
        backoff_min_s=limits.scheduler_backoff_min_s,
        backoff_max_s=limits.scheduler_backoff_max_s,
        lease_s=SchedulerConfig().kubernetes.lease_duration_s,
        keepalive_s=(QUICK_KEEPALIVE_TIME_MS + QUICK_KEEPALIVE_TIMEOUT_MS) / 2000,
        report_interval_s=limits.heartbeat_interval_s / 4,
        step_s=0.05,
        prefill_s=(0.1, 0.4),
        pull_s=(0.01, 0.05),
    )
