"""The few words of Grafana's dashboard JSON that we use: rows of panels, each with queries. Knows no metric."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_COLUMNS, _WIDTH, _HEIGHT = 24, 12, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_METRIC = re.compile(r"\b(?:baton|http)_\w+")


@dataclass(frozen=True)
class Panel:
    """A picture over time: what the queries give, by legend."""

    title: str
    unit: str
    """As Grafana names it: s, reqps, percentunit, Bps, short."""
    queries: dict[str, str]
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    name: str
    title: str
    rows: dict[str, list[Panel]] = field(default_factory=dict)

    def json(self) -> str:
        """The text that is committed."""
        page = {
            "uid": f"baton-{self.name}",
            "title": self.title,
            "tags": ["baton"],
            "schemaVersion": 39,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "links": [{"type": "dashboards", "tags": ["baton"], "title": "Baton", "asDropdown": False}],
            "templating": {"list": _variables()},
            "panels": list(self._panels()),
        }
        return json.dumps(page, indent=1) + "\n"

    def _panels(self) -> Any:
        number, top = 0, 0
        for title, panels in self.rows.items():
            number += 1
            yield {"id": number, "type": "row", "title": title, "gridPos": _place(0, top, _COLUMNS, 1), "panels": []}
            top += 1
            for index, panel in enumerate(panels):
                number += 1
                left = index * _WIDTH % _COLUMNS
                yield _panel(panel, number, _place(left, top, _WIDTH, _HEIGHT))
                if left + _WIDTH == _COLUMNS or index + 1 == len(panels):
                    top += _HEIGHT


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    metrics = sorted({name for query in panel.queries.values() for name in _METRIC.findall(query)})
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom |= {"fillOpacity": 60, "stacking": {"mode": "normal", "group": "A"}}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": f"docs/metrics.md: {', '.join(metrics)}",
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _variables() -> list[dict[str, Any]]:
    def asked(name: str, query: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": "query",
            "datasource": _SOURCE,
            "query": query,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }

    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        asked("release", "label_values(baton_scheduler_leads, release)"),
        asked("pool", 'label_values(baton_worker_requests_live{release=~"$release"}, pool)'),
    ]
