"""Telemetry: one line per event whatever it holds, and metrics over HTTP."""

from __future__ import annotations

import logging
import sys
import urllib.request

from prometheus_client import Counter

from runtime.telemetry import LineFormatter, serve_metrics


def line(message: str, *args: object, exc_info: object = None, **fields: object) -> str:
    record = logging.LogRecord("demo", logging.INFO, "f.py", 1, message, args, exc_info)  # type: ignore[arg-type]
    vars(record).update(fields)
    return LineFormatter("p-1").format(record)


def test_an_event_is_its_level_process_logger_message_and_fields() -> None:
    text = line("lease %s", "expired", lease="a-1", held_s=1.23456789, note='say "hi" now', empty="")
    assert (
        text.partition(" ")[2]
        == 'info p-1 demo lease expired lease=a-1 held_s=1.23457 note="say \\"hi\\" now" empty=""'
    )


def test_what_vllm_puts_into_every_record_is_no_field_of_an_event() -> None:
    assert line("ready", vllm_process_name="MainProcess").endswith("info p-1 demo ready")


def test_an_event_never_spans_lines_even_with_an_exception() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        text = line("a\nb", exc_info=sys.exc_info(), value=["x\ny"])
    assert "\n" not in text
    assert "ValueError" in text


def test_metrics_are_served_over_http() -> None:
    Counter("baton_telemetry_test_total", "Only this test counts.").inc()
    address = serve_metrics("127.0.0.1", 0)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as reply:
        assert "baton_telemetry_test_total 1.0" in reply.read().decode()
