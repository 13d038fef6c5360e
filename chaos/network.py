"""The ports of a cluster with a relay before each process, and the settings for it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from chaos.relay import Relays, Route
from launcher.local.process_plan import ProcessSpec

HOST = "127.0.0.1"
_ATTEMPTS_MAX = 64


class Network:
    """Two ports for every process that others connect to: its own, and its relay's, which the others are told."""

    def __init__(self, specs: Sequence[ProcessSpec]) -> None:
        """Raises OSError when this machine has no run of ports left that is long enough."""
        self._kept: list[socket.socket] = []
        self.settings: list[str] = []
        """What `baton up` must be told."""
        routes: list[Route] = []
        for section, roles in (("scheduler", ("scheduler",)), ("worker", ("prefill", "decode"))):
            ids = [spec.id for spec in specs if spec.role in roles]
            # Bound and not listened on: the process may listen there, now and whenever it is started again.
            own, relayed = _bound_run(len(ids)), _bound_run(len(ids))
            self._kept += own
            routes += map(Route, ids, relayed, map(_port, own))
            self.settings += [f"{section}.port={_port(own[0])}", f"{section}.advertise_port={_port(relayed[0])}"]
        self.relays = Relays(HOST, routes)

    async def start(self) -> None:
        """Relay."""
        await self.relays.start()

    async def close(self) -> None:
        """End the relays and let the ports go."""
        await self.relays.close()
        for kept in self._kept:
            kept.close()


def _bound_run(count: int) -> list[socket.socket]:
    """Sockets bound to ``count`` ports in a row, as workers count theirs."""
    for _ in range(_ATTEMPTS_MAX):
        with contextlib.ExitStack() as undo:
            first = undo.enter_context(_bound(0))
            try:
                rest = [undo.enter_context(_bound(_port(first) + offset)) for offset in range(1, count)]
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


def _port(bound: socket.socket) -> int:
    return int(bound.getsockname()[1])
