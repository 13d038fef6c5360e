"""Logs as one structured line per event, and the metrics endpoint. Defines no metric and knows no domain word."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import prometheus_client

from runtime.grpc_server import join_address

# What every LogRecord has; anything beyond came from ``extra`` and is a field of the event.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Put into every record of a process by the library, whoever logs.
_FOREIGN_FIELDS = frozenset({"vllm_process_name"})


class LineFormatter(logging.Formatter):
    """``time level process logger event key=value ...`` on exactly one line, exceptions included."""

    def __init__(self, process_id: str) -> None:
        super().__init__()
        self._process_id = process_id

    def format(self, record: logging.LogRecord) -> str:
        """The line for ``record``."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = f"{at} {record.levelname.lower()} {self._process_id} {record.name} {record.getMessage()}"
        return " ".join((head, *_fields(record, self))).replace("\r", "\\r").replace("\n", "\\n")


def configure_logging(level: str, process_id: str) -> None:
    """Send every log of this process to stderr, one line each, at ``level`` (a name such as ``info``) and above."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(LineFormatter(process_id))
    logging.basicConfig(level=level.upper(), handlers=[stderr], force=True)
    logging.captureWarnings(True)


def serve_metrics(host: str, port: int) -> str:
    """Serve ``/metrics`` from a thread of its own for the rest of the process; returns the address it listens on.

    Raises OSError when the address cannot be bound.
    """
    server, _ = prometheus_client.start_http_server(port, host)
    return join_address(host, server.server_port)


def _fields(record: logging.LogRecord, formatter: logging.Formatter) -> Iterator[str]:
    for key, value in vars(record).items():
        if key not in _RECORD_FIELDS and key not in _FOREIGN_FIELDS:
            yield f"{key}={_text(value)}"
    if record.exc_info:
        yield f"exception={json.dumps(formatter.formatException(record.exc_info))}"
    if record.stack_info:
        yield f"stack={json.dumps(record.stack_info)}"


def _text(value: object) -> str:
    match value:
        case float():
            return f"{value:.6g}"
        case str() if value and not any(character.isspace() or character in '"=' for character in value):
            return value
        case str():
            return json.dumps(value, ensure_ascii=False)
        case _:
            text = str(value)
            return json.dumps(text, ensure_ascii=False) if any(c.isspace() for c in text) else text
