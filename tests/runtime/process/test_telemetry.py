"""Telemetry: metrics over HTTP."""

from __future__ import annotations

import httpx
from prometheus_client import Counter

from runtime.process.telemetry import serve_metrics


def test_metrics_are_served_over_http() -> None:
    Counter("baton_telemetry_test_total", "Only this test counts.").inc()
    address = serve_metrics("127.0.0.1", 0)
    assert "baton_telemetry_test_total 1.0" in httpx.get(f"http://{address}/metrics", timeout=20).text
