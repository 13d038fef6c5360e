"""Metrics that count nothing, and runs that log nothing: thousands of processes start in a run of many seeds."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Any

import structlog


class Quiet:
    """Any metric, and any group of them."""

    def __getattr__(self, _name: str) -> Any:
        return QUIET

    def __call__(self, *_arguments: object, **_named: object) -> Any:
        """Itself."""
        return QUIET


QUIET: Any = Quiet()
for _name in ("inc", "observe", "labels", "set", "watch", "let_go", "ended_as"):
    setattr(Quiet, _name, lambda self, *_arguments, **_named: self)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The body runs fast: nothing is logged, which would be hours of text, and garbage is collected after it."""
    before = structlog.get_config()
    silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=silent, logger_factory=structlog.ReturnLoggerFactory(), processors=[])
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        structlog.configure(**before)
