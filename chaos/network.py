"""The ports of a cluster with a relay before each process, and the settings for it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from chaos.relay import HOST, Route, port_of
from launcher.backend import ProcessSpec

_ATTEMPTS_MAX = 64


def routes_to(specs: Sequence[ProcessSpec]) -> tuple[list[Route], list[str]]:
    """Two ports for every process that others connect to, its own and its relay's; and what `baton up` must be told.

    Raises OSError when this machine has no run of ports left that is long enough.
    """
    routes: list[Route] = []
    settings: list[str] = []
    for section, roles in (("scheduler", ("scheduler",)), ("worker", ("prefill", "decode"))):
        ids = [spec.id for spec in specs if spec.role in roles]
        own, relayed = _bound_run(len(ids)), _bound_run(len(ids))
        routes += map(Route, ids, relayed, own)
        settings += [f"{section}.port={port_of(own[0])}", f"{section}.advertise_port={port_of(relayed[0])}"]
    return routes, settings


def _bound_run(count: int) -> list[socket.socket]:
    """Sockets bound to ``count`` ports in a row, as workers count theirs."""
    for _ in range(_ATTEMPTS_MAX):
        with contextlib.ExitStack() as undo:
            first = undo.enter_context(_bound(0))
            try:
                rest = [undo.enter_context(_bound(port_of(first) + offset)) for offset in range(1, count)]
            except (OSError, OverflowError):
                continue  # another process has one of them
            undo.pop_all()
            return [first, *rest]
    raise OSError(f"no {count} free ports in a row on {HOST}")


def _bound(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((HOST, port))
    except (OSError, OverflowError):
        found.close()
        raise
    return found
