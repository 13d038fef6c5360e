"""Metrics that count nothing: thousands of processes start in a run of many seeds, and nothing scrapes them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import structlog


class Quiet:
    """Any metric, and any group of them."""

    output_tokens: Any

    def __getattr__(self, _name: str) -> Quiet:
        return QUIET

    def __call__(self, *_arguments: object, **_named: object) -> Quiet:
        """Itself."""
        return QUIET


QUIET = Quiet()
for _name in ("inc", "observe", "labels", "set", "watch", "let_go", "ended_as"):
    setattr(Quiet, _name, lambda self, *_arguments, **_named: self)


class QuietMetrics(Quiet):
    """One process's."""

    def __init__(self) -> None:
        self.output_tokens = 0


@contextlib.contextmanager
def no_logs() -> Iterator[None]:
    """Nothing is logged in the body: what processes under faults say would be hours of text."""
    before = structlog.get_config()
    silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=silent, logger_factory=structlog.ReturnLoggerFactory(), processors=[])
    try:
        yield
    finally:
        structlog.configure(**before)
