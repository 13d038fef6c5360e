"""The numbers a scheduler shows. Defines metrics; docs/metrics.md says what each means. Never decides by them."""

from __future__ import annotations

import math

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from runtime.buckets import DECISION_S, TIME_TO_FIRST_TOKEN_S
from runtime.roles import WORKER_ROLES, WorkerRole
from scheduler.api.worker_info import WorkerState
from scheduler.core import SchedulerCore

_OUTCOMES = frozenset({"finished", "failed", "cancelled"})
_PREFIXES = {
    "blocks": "KV blocks in the prefix index, each once",
    "gaps": "Times that a worker's blocks were forgotten since a change was missing",
    "overflows": "Times that a worker's blocks were forgotten for want of room",
}

_PLANNED = {
    "needed_workers": ("Fully busy workers that the traffic needs", "role"),
    "wanted_workers": ("Workers that would not be too busy", "role"),
    "desired_replicas": ("Workers that should be there", "pool"),
    "busier_job": ("How busy the workers of the busier job are: 1 is fully", "split"),
}


class SchedulerMetrics:
    """One scheduler's metrics. A process has one; tests give each scheduler a registry of its own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.plans = Counter("baton_scheduler_plans_total", "Plans granted", ("decision", "reason"), registry=registry)
        self.refusals = Counter("baton_scheduler_refusals_total", "Plans refused", ("reason",), registry=registry)
        self.plan_s = Histogram(
            "baton_scheduler_plan_duration_seconds", "Time to decide one plan", buckets=DECISION_S, registry=registry
        )
        unread = "baton_scheduler_records_set_aside_total"
        self.records_set_aside = Counter(unread, "Usage records that could not be read", registry=registry)
        self.sessions_closed = Counter(
            "baton_scheduler_sessions_closed_total",
            "Streams of workers and front proxies that ended",
            ("peer", "reason"),
            registry=registry,
        )
        self._requests_ended = Counter(
            "baton_scheduler_requests_ended_total", "Planned requests that ended", ("outcome",), registry=registry
        )
        self._workers = Gauge("baton_scheduler_workers", "Registered workers", ("role", "state"), registry=registry)
        self._fronts = Gauge("baton_scheduler_front_proxies", "Connected front proxies", registry=registry)
        self._leads = Gauge("baton_scheduler_leads", "1 while this scheduler leads", registry=registry)
        in_flight = "Plans granted and not ended"
        self._plans_in_flight = Gauge("baton_scheduler_plans_in_flight", in_flight, registry=registry)
        self._reserved_blocks = Gauge(
            "baton_scheduler_reserved_blocks", "KV blocks reserved for plans", ("worker",), registry=registry
        )
        self.waited_s = Histogram(
            "baton_scheduler_waited_seconds",
            "Time in the queue of requests that were then placed",
            buckets=TIME_TO_FIRST_TOKEN_S,
            registry=registry,
        )
        self._waiting = Gauge(
            "baton_scheduler_waiting", "Requests that wait to be placed", ("priority_class",), registry=registry
        )
        told = "Workers that were told to change their role"
        self.role_changes = Counter("baton_scheduler_role_changes_total", told, registry=registry)
        self._planned = {
            name: Gauge(f"baton_scheduler_{name}", text, (label,), registry=registry)
            for name, (text, label) in _PLANNED.items()
        }
        queued = "Prompt tokens that wait to be computed"
        self._queued_prefill = Gauge("baton_scheduler_queued_prefill_tokens", queued, registry=registry)
        self.ejections = Counter(
            "baton_scheduler_ejections_total", "Workers left out because they failed requests", registry=registry
        )
        unusable = "Workers that say they are ready and get nothing"
        self._unusable = Gauge("baton_scheduler_unusable_workers", unusable, ("reason",), registry=registry)
        self.reservations_dropped = Counter(
            "baton_scheduler_reservations_dropped_total",
            "Reservations without a request whose end was not reported",
            ("reason",),
            registry=registry,
        )
        self._leaks = Gauge(
            "baton_scheduler_leaked_leases",
            "Leases held for requests that no front proxy runs",
            ("worker",),
            registry=registry,
        )
        self._latency_error = Gauge(
            "baton_scheduler_latency_model_error",
            "Mean relative error of predicted engine steps",
            ("role",),
            registry=registry,
        )
        self._prefixes = {
            name: Gauge(f"baton_scheduler_prefix_{name}", text, registry=registry) for name, text in _PREFIXES.items()
        }
        self._labelled: frozenset[str] = frozenset()

    def request_ended(self, outcome: str) -> None:
        """Count an end under one of the outcomes we know."""
        self._requests_ended.labels(outcome if outcome in _OUTCOMES else "other").inc()

    def show(self, core: SchedulerCore, *, fronts: int, leads: bool) -> None:
        """Bring the gauges up to date; labels of workers that left are dropped."""
        workers, leaked = core.cluster.workers, core.leaked_leases()
        counts = {(role, state): 0 for role in WORKER_ROLES for state in WorkerState}
        unusable = dict.fromkeys(("silent", "ejected"), 0)
        errors: dict[WorkerRole, list[float]] = {role: [] for role in WORKER_ROLES}
        for worker_id, worker in workers.items():
            counts[worker.role, worker.state] += 1
            if worker.latency.reports:
                errors[worker.role].append(worker.latency.error)
            if worker.unusable:
                unusable[worker.unusable] += 1
            self._reserved_blocks.labels(worker_id).set(sum(rank.reserved_blocks for rank in worker.ranks))
            self._leaks.labels(worker_id).set(leaked.get(worker_id, 0))
        for worker_id in self._labelled.difference(workers):
            self._reserved_blocks.remove(worker_id)
            self._leaks.remove(worker_id)
        self._labelled = frozenset(workers)
        for (role, state), count in counts.items():
            self._workers.labels(role, state.value).set(count)
        for role, found in errors.items():
            self._latency_error.labels(role).set(sum(found) / len(found) if found else math.nan)
        for reason, count in unusable.items():
            self._unusable.labels(reason).set(count)
        for priority_class, count in core.waiting().items():
            self._waiting.labels(priority_class.value).set(count)
        if (planned := core.live_planner.last) is not None:
            for role, need in (("prefill", planned.prefill_need), ("decode", planned.decode_need)):
                self._planned["needed_workers"].labels(role).set(need)
                self._planned["wanted_workers"].labels(role).set(planned.wanted[role])
            for split, busy in (("now", planned.busy_now), ("best", planned.busy_then)):
                self._planned["busier_job"].labels(split).set(busy)
        for target in core.live_planner.replicas.desired:
            self._planned["desired_replicas"].labels(target.role).set(target.replicas)
        self._queued_prefill.set(core.queued_prompt_tokens())
        self._fronts.set(fronts)
        self._plans_in_flight.set(core.plans_in_flight)
        self._leads.set(leads)
        self._prefixes["blocks"].set(len(core.prefixes.index))
        self._prefixes["gaps"].set(core.prefixes.feed.gaps)
        self._prefixes["overflows"].set(core.prefixes.feed.overflows)
