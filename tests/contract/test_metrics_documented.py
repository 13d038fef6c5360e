"""docs/metrics.md and the code name the same metrics, with the same types and labels."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import front_proxy.serving_metrics
from engine.protocol import EngineLoad
from front_proxy.metrics import DispatchMetrics
from scheduler.metrics import SchedulerMetrics
from worker.metrics import WorkerMetrics

ROOT = Path(__file__).parents[2]
# Every file that may define metrics; what is defined in them is read below.
DEFINED_IN = {
    "front_proxy/metrics.py",
    "front_proxy/serving_metrics.py",
    "scheduler/metrics.py",
    "worker/metrics.py",
}
PACKAGES = (
    "decode_worker",
    "engine",
    "front_proxy",
    "kv_transfer",
    "launcher",
    "prefill_worker",
    "runtime",
    "scheduler",
    "simulation",
    "worker",
)
_ROW = re.compile(r"^\| `(baton_[a-z0-9_]+)` \| (\w+) \|([^|]*)\|([^|]+)\|([^|]+)\|$", re.MULTILINE)

Described = tuple[str, tuple[str, ...]]


def _no_load() -> EngineLoad:
    raise AssertionError("nothing is scraped here")


def _collectors() -> list[MetricWrapperBase]:
    registry = CollectorRegistry()
    SchedulerMetrics(registry)
    dispatch = DispatchMetrics(registry)
    dispatch.watch(in_flight=int, handoffs_held=int, connected=bool, degraded=bool)
    worker = WorkerMetrics("decode", registry)
    worker.watch(load=_no_load, requests=int, front_proxies=int, leases=int, lease_blocks=int, blocks_total=1)
    assert front_proxy.serving_metrics.__doc__, "imported for what it registers"
    # Prometheus' client offers no public way to the labels of a metric that has no sample yet.
    found = [*registry._collector_to_names, *REGISTRY._collector_to_names]
    return [one for one in found if isinstance(one, MetricWrapperBase)]


def _defined() -> dict[str, Described]:
    metrics: dict[str, Described] = {}
    for collector in _collectors():
        if collector._name.startswith("baton_"):
            assert collector._type is not None
            name = collector._name + ("_total" if collector._type == "counter" else "")
            metrics[name] = (collector._type, tuple(collector._labelnames))
    return metrics


def _documented() -> dict[str, Described]:
    rows = _ROW.findall((ROOT / "docs" / "metrics.md").read_text())
    names = [row[0] for row in rows]
    assert len(names) == len(set(names)), "a metric is documented twice"
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _, _ in rows}


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    assert _documented() == _defined()


def test_every_row_says_what_the_metric_means_and_what_to_do() -> None:
    lines = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `baton_")]
    assert lines
    assert [line for line in lines if not _ROW.match(line)] == []
    assert all(meaning.strip() and advice.strip() for _, _, _, meaning, advice in _ROW.findall("\n".join(lines)))


def test_metrics_are_defined_only_where_this_test_looks() -> None:
    defining: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "prometheus_client":
                    names = {alias.name for alias in node.names}
                    if names & {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}:
                        defining.add(path.relative_to(ROOT).as_posix())
    assert defining == DEFINED_IN
