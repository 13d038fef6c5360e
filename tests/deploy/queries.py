"""What a PromQL query asks for: metrics, with the labels that it selects and groups by. By a real parser; no server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import promql_parser

from tests.deploy.helm import ROOT

# What Grafana puts in before it asks.
_GRAFANA = {"$__rate_interval": "5m"}
_ROW = re.compile(r"^\| `((?:baton|http)_[a-z0-9_]+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
# What Prometheus adds to what a pod says: its own, and the two that the chart's PodMonitor makes.
TARGET_LABELS = {"instance", "job", "namespace", "pod", "container", "release", "pool"}
# Of kube-state-metrics.
FOREIGN = {
    "kube_pod_status_phase": {"namespace", "pod", "phase"},
    "kube_pod_labels": {"namespace", "pod", "label_app_kubernetes_io_name"},
}


def documented() -> dict[str, set[str]]:
    """The labels of every series that docs/metrics.md promises, by name."""
    series: dict[str, set[str]] = {}
    for name, kind, labels in _ROW.findall((ROOT / "docs" / "metrics.md").read_text()):
        known = {*re.findall(r"`(\w+)`", labels), *TARGET_LABELS}
        for suffix in _SUFFIXES.get(kind, ("",)):
            series[name + suffix] = known | ({"le"} if suffix == "_bucket" else set())
    assert series
    return series


def objections(query: str, recorded: dict[str, set[str]]) -> Iterator[str]:
    """Why the query would give nothing. ``recorded``: labels of the series that rules make."""
    for text, value in _GRAFANA.items():
        query = query.replace(text, value)
    known = {**documented(), **FOREIGN, **recorded}
    yield from _objections(promql_parser.parse(query), known)


def _objections(node: Any, known: dict[str, set[str]]) -> Iterator[str]:
    match node:
        case promql_parser.VectorSelector():
            if node.name not in known:
                yield f"there is no {node.name}"
                return
            for matcher in node.matchers.matchers:
                if matcher.name not in known[node.name]:
                    yield f"{node.name} has no label {matcher.name}"
        case promql_parser.MatrixSelector():
            yield from _objections(node.vector_selector, known)
        case promql_parser.AggregateExpr():
            given = labels_of(node.expr, known)
            if node.modifier is not None:
                yield from (f"nothing has the label {name}" for name in node.modifier.labels if name not in given)
            yield from _objections(node.expr, known)
        case promql_parser.BinaryExpr():
            yield from _objections(node.lhs, known)
            yield from _objections(node.rhs, known)
        case promql_parser.Call():
            for each in node.args:
                yield from _objections(each, known)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            yield from _objections(node.expr, known)
        case _:
            pass


def labels_of(node: Any, known: dict[str, set[str]]) -> set[str]:
    """The labels that what ``node`` gives may have."""
    match node:
        case promql_parser.VectorSelector():
            return known.get(node.name or "", set())
        case promql_parser.MatrixSelector():
            return labels_of(node.vector_selector, known)
        case promql_parser.AggregateExpr():
            return set(node.modifier.labels) if node.modifier is not None else set()
        case promql_parser.BinaryExpr():
            return labels_of(node.lhs, known) | labels_of(node.rhs, known)
        case promql_parser.Call():
            # label_replace and label_join name the label that they make.
            made = {each.val for each in node.args if isinstance(each, promql_parser.StringLiteral)}
            return made.union(*(labels_of(each, known) for each in node.args))
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            return labels_of(node.expr, known)
        case _:
            return set()
