"""One dialect of logs: ``log.info("lease expired", lease=..., held_s=...)`` is one line on stderr.

Events pass through the standard library's loggers, and libraries' own logs are written in the same form.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime

import structlog
from structlog.typing import EventDict

from runtime.failures import FailureError, FailureKind

# Names this process in its logs, also in those of the processes that a library starts for it.
_PROCESS_ID = "BATON_PROCESS_ID"
# What vLLM's engine core logs where it logs nothing else of a bad grammar.
_GRAMMAR_FAULT = "Failed to compile grammar for request %s"
_WORDS_CHARACTERS_MAX = 500
# An API key (accounts/keys.py). vLLM logs what is wrong with a field, and a client may put its key into any.
_KEY = re.compile(r"(bt-[0-9A-Za-z]{10})[0-9A-Za-z]{38}")


class LineFormatter(logging.Formatter):
    """``time level process logger event key=value ...`` on exactly one line, exceptions included; of a key the id."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for ``record``."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        process_id = os.environ.get(_PROCESS_ID, str(record.process))
        words = [at, record.levelname.lower(), process_id, record.name, record.getMessage(), *self._trace(record)]
        return _KEY.sub(r"\1...", " ".join(words)).replace("\r", "\\r").replace("\n", "\\n")

    def _trace(self, record: logging.LogRecord) -> Iterator[str]:
        """What only libraries' records carry beside their message."""
        if record.exc_info:
            yield f"exception={json.dumps(self.formatException(record.exc_info))}"
        if record.stack_info:
            yield f"stack={json.dumps(record.stack_info)}"


class ContentFaults(logging.Filter):
    """Faults of a request's own content: one line without a trace where the engine finds them, and none further on."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is written; it may lose its trace."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        if record.msg == _GRAMMAR_FAULT:
            words = str(error)[:_WORDS_CHARACTERS_MAX].replace("%", "%%")
            record.msg, record.exc_info = f"{_GRAMMAR_FAULT}: {words}", None
        cause = error.__cause__
        return not (isinstance(cause, FailureError) and cause.failure.kind is FailureKind.BAD_REQUEST)


def configure_logging(level: str, process_id: str) -> None:
    """Send every log of this process to stderr, one line each, at ``level`` (a name such as ``info``) and above."""
    os.environ[_PROCESS_ID] = process_id
    stderr = logging.StreamHandler()
    stderr.setFormatter(LineFormatter())
    stderr.addFilter(ContentFaults())
    logging.basicConfig(level=level.upper(), handlers=[stderr], force=True)
    logging.captureWarnings(True)
    # A line for every request to the API server of Kubernetes.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_no_metadata)
    # An event below the level costs one call that does nothing.
    enabled = structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()])
    structlog.configure(wrapper_class=enabled, cache_logger_on_first_use=True)


def _no_metadata(record: logging.LogRecord) -> bool:
    """gRPC logs metadata that is not UTF-8, with a traceback for each: it may be a key, and is no error of ours."""
    return not str(record.msg).startswith("Invalid encoding")


def _event_line(_: object, __: str, event: EventDict) -> str:
    return " ".join((str(event.pop("event")), *(f"{key}={_text(value)}" for key, value in event.items())))


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


# Until configure_logging() is called, as in tests, the standard library's settings decide what is written.
structlog.configure(
    processors=[structlog.stdlib.filter_by_level, structlog.processors.format_exc_info, _event_line],
    wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
    logger_factory=structlog.stdlib.LoggerFactory(),
)
