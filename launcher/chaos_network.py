"""The ports of a cluster whose processes are reached through relays, and the settings that make it so."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Sequence

from launcher.chaos_grpc_relay import MessageRelays, MessageRoute
from launcher.chaos_relay import Relays, Route
from launcher.process_plan import ProcessSpec
from simulation.schedule import CONNECTION_KINDS, MESSAGE_KINDS, FaultKind

HOST = "127.0.0.1"
_ATTEMPTS_MAX = 64


class Network:
    """Ports for every process that others dial: its own, and in front of it those of the relays that ``kinds`` need.

    Whoever dials comes to the relay of connections first, which sees by its sockets who that is, then to the relay of
    messages, which reads who speaks.
    """

    def __init__(self, specs: Sequence[ProcessSpec], kinds: Collection[FaultKind], seed: int) -> None:
        """Raises OSError when this machine has no run of ports left that is long enough."""
        self._kept: list[socket.socket] = []
        self.settings: list[str] = []
        """What `baton up` must be told."""
        connections: list[Route] = []
        messages: list[MessageRoute] = []
        for section, roles in (("scheduler", ("scheduler",)), ("worker", ("prefill", "decode"))):
            ids = [spec.id for spec in specs if spec.role in roles]
            # Bound and not listened on: who serves there may do so, now and whenever it is started again.
            own = dialled = self._keep(len(ids))
            if MESSAGE_KINDS.intersection(kinds):
                dialled = self._keep(len(ids))
                messages += map(MessageRoute, ids, map(_port, dialled), map(_port, own))
            if CONNECTION_KINDS.intersection(kinds):
                behind, dialled = dialled, _bound_run(len(ids))
                connections += map(Route, ids, dialled, map(_port, behind))
            self.settings += [f"{section}.port={_port(own[0])}", f"{section}.advertise_port={_port(dialled[0])}"]
        self.relays = Relays(HOST, connections)
        self.message_relays = MessageRelays(HOST, messages, seed)

    async def start(self) -> None:
        """Relay."""
        await self.message_relays.start()
        await self.relays.start()

    async def close(self) -> None:
        """End the relays and let the ports go."""
        await self.relays.close()
        await self.message_relays.close()
        for kept in self._kept:
            kept.close()

    def _keep(self, count: int) -> list[socket.socket]:
        kept = _bound_run(count)
        self._kept += kept
        return kept


def _bound_run(count: int) -> list[socket.socket]:
    """Sockets bound to ``count`` ports in a row, as workers count theirs."""
    for _ in range(_ATTEMPTS_MAX):
        with contextlib.ExitStack() as undo:
            first = undo.enter_context(_bound(0))
            try:
                rest = [undo.enter_context(_bound(_port(first) + offset)) for offset in range(1, count)]
            except (OSError, OverflowError):
                continue  # somebody has one of them
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
