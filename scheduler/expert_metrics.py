"""The numbers of expert placement. Defines metrics; docs/metrics.md says what each means. Never decides by them."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

_OF_GROUP = ("worker", "role")


class ExpertMetrics:
    """One scheduler's metrics of all groups."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"baton_experts_{name}", text, _OF_GROUP, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"baton_experts_{name}_total", text, (*_OF_GROUP, *labels), registry=registry)

        self.balance = gauge("balance", "Mean load of a rank over the highest, of the live map under recent tokens")
        self.worst_layer = gauge("balance_worst_layer", "The same of the worst layer")
        self.predicted = gauge("balance_predicted", "What the last map that went live was predicted to give")
        self.stall_s = gauge("stall_seconds", "How long the last change stopped the slowest rank")
        self.moves = counter("moves", "Experts received by ranks")
        self.bytes = counter("moved_bytes", "Bytes of experts received by ranks")
        self.rollouts = counter("rollouts", "Changes of a group's map that ended", "outcome")
        self.alarms = counter("watchdog_alarms", "Changes that took too long, or ranks that differ")
