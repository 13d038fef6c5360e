"""docs/metrics.md and the code name the same metrics, with the same types and labels."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.gateway import metrics as gateway_metrics
from runtime.rpc import trust
from scheduler.expert_metrics import ExpertMetrics
from scheduler.metrics import SchedulerMetrics
from tests.test_repository import PACKAGES, ROOT
from worker.metrics import WorkerMetrics

# Every file that may define metrics; what is defined in them is read below.
DEFINED_IN = {
    "front_proxy/dispatch/metrics.py",
    "front_proxy/gateway/metrics.py",
    "runtime/rpc/trust.py",
    "scheduler/expert_metrics.py",
    "scheduler/metrics.py",
    "worker/metrics.py",
}
_ROW = re.compile(r"^\| `((?:baton|http)_[a-z0-9_]+)` \| (\w+) \|([^|]*)\|([^|]+)\|([^|]+)\|$", re.MULTILINE)

# What a file must import from prometheus_client to define a metric.
_DEFINING = {
    "Counter", "Gauge", "Histogram", "Summary", "Info", "Enum", "CounterMetricFamily", "GaugeMetricFamily",
}  # fmt: skip

Described = tuple[str, tuple[str, ...]]


def _collectors() -> list[Collector]:
    registry = CollectorRegistry()
    SchedulerMetrics(registry)
    ExpertMetrics(registry)
    dispatch = DispatchMetrics(registry)
    dispatch.watch(in_flight=int, handoffs_held=int, connected=bool, degraded=bool, waiting_for_pool=int)
    nothing_is_scraped: Any = None
    WorkerMetrics("decode", registry).watch(nothing_is_scraped)
    assert gateway_metrics.__doc__ and trust.__doc__, "imported for what they register"
    return [*registry._collector_to_names, *REGISTRY._collector_to_names]


def _describe(collector: Collector) -> Iterator[tuple[str, Described]]:
    if isinstance(collector, MetricWrapperBase):
        # Prometheus' client offers no public way to the labels of a metric that has no sample yet.
        assert collector._type is not None
        yield collector._name, (collector._type, tuple(collector._labelnames))
        return
    for family in collector.collect():
        # Ours show every series from the start.
        labels = {name: None for sample in family.samples for name in sample.labels if name != "le"}
        yield family.name, (family.type, tuple(labels))


def _defined() -> dict[str, Described]:
    metrics: dict[str, Described] = {}
    for collector in _collectors():
        for name, (kind, labels) in _describe(collector):
            if name.startswith(("baton_", "http_")):
                metrics[name + ("_total" if kind == "counter" else "")] = (kind, labels)
    return metrics


def _documented() -> dict[str, Described]:
    rows = _ROW.findall((ROOT / "docs" / "metrics.md").read_text())
    names = [row[0] for row in rows]
    assert len(names) == len(set(names)), "a metric is documented twice"
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _, _ in rows}


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    assert _documented() == _defined()


def test_every_row_says_what_the_metric_means_and_what_to_do() -> None:
    lines = [
        line
        for line in (ROOT / "docs" / "metrics.md").read_text().splitlines()
        if line.startswith(("| `baton_", "| `http_"))
    ]
    assert lines
    assert [line for line in lines if not _ROW.match(line)] == []
    assert all(meaning.strip() and advice.strip() for _, _, _, meaning, advice in _ROW.findall("\n".join(lines)))


def test_metrics_are_defined_only_where_this_test_looks() -> None:
    defining = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("prometheus_client")
        if {alias.name for alias in node.names} & _DEFINING
    }
    # A kind of histogram, and none itself.
    assert defining - {"runtime/late_histogram.py"} == DEFINED_IN
