"""How many files and sockets this process may have open at once. Opens none."""

from __future__ import annotations

import resource
import sys

import structlog

log = structlog.get_logger(__name__)


def open_files_max() -> int:
    """The limit of this process now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raise the limit of this process, and of those that it starts, as far as it is allowed to.

    A connection is an open file, and systemd and ssh start processes with a limit of 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of open files stays as it is", limit=soft, why=str(error))
