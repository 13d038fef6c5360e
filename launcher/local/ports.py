"""Addresses that outlive the processes behind them: sockets that `baton up` binds and keeps. Accepts no connection.

A front proxy inherits its HTTP socket: while no front proxy runs, clients wait in the socket's queue instead of being
refused. gRPC accepts no inherited socket, so its ports are only reserved: bound here without listening. One process can
then listen on the port (both use SO_REUSEADDR), and the kernel gives the number to no other process.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from launcher.config import BatonConfig
from launcher.local.process_plan import ProcessSpec
from runtime.user_error import UserError

# Names the inherited socket in a front proxy's environment.
HTTP_FD_VARIABLE = "BATON_HTTP_FD"


class StartError(UserError):
    """The cluster cannot be started as asked; the message says why, in a sentence."""


class HeldPorts:
    """The sockets of one cluster, by process. ``take`` makes them, ``close`` lets them all go."""

    def __init__(self) -> None:
        self._http: dict[str, socket.socket] = {}
        self._kept: list[socket.socket] = []
        self._settings: dict[str, list[str]] = {}

    @classmethod
    def take(cls, config: BatonConfig, specs: Sequence[ProcessSpec]) -> HeldPorts:
        """Bind the ports that clients, workers and front proxies connect to. Raises StartError when a port is taken."""
        held = cls()
        front, scheduler = config.front_proxy, config.scheduler
        with contextlib.ExitStack() as undo:
            undo.callback(held.close)
            first, schedulers = True, 0
            for spec in specs:
                if spec.role == "scheduler":
                    port = scheduler.port + schedulers if scheduler.port else 0
                    held._keep(spec.id, scheduler.host, port, "scheduler.port")
                    schedulers += 1
                elif spec.role == "front_proxy":
                    port, grpc_port = (front.port, front.grpc_port) if first else (0, 0)
                    listener = _bound(front.host, port, "front_proxy.port", "--port")
                    held._http[spec.id] = listener
                    held._set(spec.id, "front_proxy.port", listener)
                    held._keep(spec.id, front.host, grpc_port, "front_proxy.grpc_port", "--grpc-port")
                    first = False
            undo.pop_all()
        return held

    def settings(self, process_id: str) -> Sequence[str]:
        """The settings with which a process gets its ports."""
        return self._settings.get(process_id, ())

    def http_fd(self, process_id: str) -> int | None:
        """The socket that a process inherits; None if it binds its own."""
        held = self._http.get(process_id)
        return None if held is None else held.fileno()

    def refuse(self, process_id: str) -> None:
        """No process will serve here any more: close the socket, so that clients are refused instead of waiting."""
        if (held := self._http.pop(process_id, None)) is not None:
            held.close()

    def close(self) -> None:
        """Close every socket."""
        for held in (*self._http.values(), *self._kept):
            held.close()
        self._http.clear()
        self._kept.clear()

    def _keep(self, process_id: str, host: str, port: int, setting: str, flag: str | None = None) -> None:
        kept = _bound(host, port, setting, flag)
        self._kept.append(kept)
        self._set(process_id, setting, kept)

    def _set(self, process_id: str, setting: str, held: socket.socket) -> None:
        self._settings.setdefault(process_id, []).append(f"{setting}={held.getsockname()[1]}")


def _bound(host: str, port: int, setting: str, flag: str | None) -> socket.socket:
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As servers do: a port counts as free when its last connections are closing.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except OSError as error:
        held.close()
        how = f"{flag}, or 0 for any free one" if flag else "--set, or 0 for any free one"
        raise StartError(
            f"cannot listen on {host}:{port} ({setting}): {error.strerror}; choose another with {how}"
        ) from error
    return held
