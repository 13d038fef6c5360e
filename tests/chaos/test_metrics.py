"""What chaos judges by the processes' own numbers: bounds at any time, and nothing left at the end."""

from __future__ import annotations

import msgspec

from chaos.metrics import beyond_bounds, left, read
from chaos.report import ChaosReport, as_text, judged
from chaos.traffic import Counts
from chaos.usage import UsageFound
from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from launcher.config import BatonConfig
from scheduler.config import SchedulerParameters
from simulation.faults.invariants import Invariant

LIMITS = FrontProxyLimits(retry_budget_burst=3, retry_budget_ratio=0.5, retry_budget_per_s=0.1)
CONFIG = BatonConfig(front_proxy=FrontProxyConfig(requests_in_flight_max=10))
WAITING_MAX = SchedulerParameters().waiting_max


def front(retries: int, requests: int, in_flight: int = 0) -> str:
    return (
        "# TYPE baton_front_proxy_retries counter\n"
        f'baton_front_proxy_retries_total{{stage="decode",reason="unavailable"}} {retries - 1}\n'
        'baton_front_proxy_retries_total{stage="prefill",reason="unavailable"} 1\n'
        "# TYPE baton_front_proxy_requests counter\n"
        f'baton_front_proxy_requests_total{{outcome="finished"}} {requests}\n'
        "# TYPE baton_front_proxy_requests_in_flight gauge\n"
        f"baton_front_proxy_requests_in_flight {in_flight}\n"
        "process_start_time_seconds 1000\n"
    )


def scheduler(waiting: int, plans: int) -> str:
    return (
        "# TYPE baton_scheduler_waiting gauge\n"
        f'baton_scheduler_waiting{{priority_class="interactive"}} {waiting}\n'
        f"baton_scheduler_plans_in_flight {plans}\n"
    )


def test_retries_are_held_against_the_budget_of_this_incarnation() -> None:
    # 3 at once, 0.5 for each of 10 requests, 0.1 for each of 20 seconds.
    within = read("front-proxy-0", "front_proxy", front(10, 10), 1020.0)
    beyond = read("front-proxy-1", "front_proxy", front(11, 10), 1020.0)
    ((invariant, what),) = beyond_bounds([within, beyond], CONFIG, LIMITS)
    assert invariant is Invariant.RETRIES and what.startswith("front-proxy-1 ")


def test_a_line_and_a_front_proxy_that_are_longer_than_they_may_be_are_told() -> None:
    full = [
        read("scheduler", "scheduler", scheduler(WAITING_MAX, 0), 0.0),
        read("f", "front_proxy", front(1, 1, 10), 1000.0),
    ]
    assert list(beyond_bounds(full, CONFIG, LIMITS)) == []
    over = [
        read("scheduler", "scheduler", scheduler(WAITING_MAX + 1, 0), 0.0),
        read("f", "front_proxy", front(1, 1, 11), 1000.0),
    ]
    assert [invariant for invariant, _ in beyond_bounds(over, CONFIG, LIMITS)] == [Invariant.QUEUES] * 2


def test_plans_and_requests_that_are_left_are_told() -> None:
    said = [read("scheduler", "scheduler", scheduler(0, plans), 0.0) for plans in (0, 2)]
    assert list(left(said)) == [(Invariant.RETURNED, "scheduler says baton_scheduler_plans_in_flight 2")]


def test_the_verdict_names_every_invariant_that_can_be_seen() -> None:
    broken = {Invariant.RETRIES: ["front-proxy-0 retried 9 times, 3 are allowed"]}
    report = ChaosReport(
        seed=1,
        passed=False,
        counts=Counts(requests=3),
        leases_left=0,
        blocks_left=0,
        usage=UsageFound(records=3, estimated=0, wrong=[]),
        broken=broken,
    )
    unseen = {Invariant.BLAME, Invariant.BUDGETS, Invariant.ENDS_ONCE, Invariant.ONE_LEADS}
    assert Invariant.BILLED not in judged(msgspec.structs.replace(report, usage=None)), "nothing was counted"
    assert set(judged(report)) == set(Invariant) - unseen
    assert [invariant for invariant, held in judged(report).items() if not held] == [Invariant.RETRIES]
    assert f"BROKEN {Invariant.RETRIES}" in as_text(report).splitlines()
