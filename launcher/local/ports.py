"""Addresses that outlive the processes behind them: sockets that `baton up` binds and keeps. Accepts no connection.

A front proxy inherits its HTTP socket: while no front proxy runs, clients wait in the socket's queue instead of being
refused. gRPC accepts no inherited socket, so its ports are only reserved: bound here without listening. A process can
then listen on the port (both use SO_REUSEADDR), and the kernel gives the number to no other process.

Several front proxies share the HTTP port and the gRPC port (SO_REUSEPORT). Each has an HTTP socket of its own, and the
kernel spreads new connections over those that listen. What is asked of one process has ports that it does not share.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence

from front_proxy.config import FrontProxyConfig
from launcher.backend import ProcessSpec, StartError
from launcher.config import BatonConfig

# Names the inherited socket in a front proxy's environment.
HTTP_FD_VARIABLE = "BATON_HTTP_FD"
# Names the port, on the loopback address, for the status of a front proxy that shares its other ports.
STATUS_PORT_VARIABLE = "BATON_STATUS_PORT"
_LOOPBACK = "127.0.0.1"


class HeldPorts:
    """The sockets of one cluster, by process. ``take`` makes them, ``close`` lets them all go."""

    def __init__(self) -> None:
        self._http: dict[str, socket.socket] = {}
        self._shared_http = ("", 0)
        self._kept: list[socket.socket] = []
        self._settings: dict[str, list[str]] = {}
        self._status_ports: dict[str, int] = {}

    @classmethod
    def take(cls, config: BatonConfig, specs: Sequence[ProcessSpec]) -> HeldPorts:
        """Bind the ports that clients, workers and front proxies connect to. Raises StartError when a port is taken."""
        held = cls()
        scheduler = config.scheduler
        with contextlib.ExitStack() as undo:
            undo.callback(held.close)
            for index, spec in enumerate(spec for spec in specs if spec.role == "scheduler"):
                kept = held._keep(scheduler.host, scheduler.port and scheduler.port + index, "scheduler.port", "--set")
                held._set(spec.id, "scheduler.port", kept)
            held._take_fronts(config.front_proxy, [spec.id for spec in specs if spec.role == "front_proxy"])
            undo.pop_all()
        return held

    def settings(self, process_id: str) -> Sequence[str]:
        """The settings with which a process gets its ports."""
        return self._settings.get(process_id, ())

    def variables(self, process_id: str) -> Mapping[str, str]:
        """What its environment says of them."""
        numbers = {HTTP_FD_VARIABLE: self.http_fd(process_id), STATUS_PORT_VARIABLE: self._status_ports.get(process_id)}
        return {name: str(number) for name, number in numbers.items() if number is not None}

    def http_fd(self, process_id: str) -> int | None:
        """The socket that a process inherits; None if it binds its own."""
        held = self._http.get(process_id)
        return None if held is None else held.fileno()

    def refuse(self, process_id: str) -> None:
        """No process will serve here any more: close the socket, so that clients are refused instead of waiting.

        The kernel gives new connections to the front proxies that share the port, where there are any.
        """
        if (held := self._http.pop(process_id, None)) is not None:
            held.close()

    def admit(self, process_id: str) -> None:
        """A process will serve here after all: where it shares the port, it gets a socket again. Raises StartError."""
        if process_id in self._status_ports and process_id not in self._http:
            self._http[process_id] = _bound(*self._shared_http, "front_proxy.port", "--port", shared=True)

    def close(self) -> None:
        """Close every socket."""
        for held in (*self._http.values(), *self._kept):
            held.close()
        self._http.clear()
        self._status_ports.clear()
        self._kept.clear()

    def _take_fronts(self, front: FrontProxyConfig, ids: Sequence[str]) -> None:
        http = _bound(front.host, front.port, "front_proxy.port", "--port")
        self._http[ids[0]] = http
        grpc = self._keep(front.host, front.grpc_port, "front_proxy.grpc_port", "--grpc-port")
        if len(ids) > 1:
            self._share(http, "front_proxy.port", "--port")
            self._share(grpc, "front_proxy.grpc_port", "--grpc-port")
            self._shared_http = (front.host, _port_of(http))
        for process_id in ids:
            self._set(process_id, "front_proxy.port", http)
            self._set(process_id, "front_proxy.grpc_port", grpc)
            if len(ids) == 1:
                continue
            self._status_ports[process_id] = _port_of(self._keep(_LOOPBACK, 0, "the port of its status", "--set"))
            self.admit(process_id)
            if not front.metrics_port:
                # On the shared port any of them would answer for /metrics.
                kept = self._keep(front.host, 0, "front_proxy.metrics_port", "--set")
                self._set(process_id, "front_proxy.metrics_port", kept)

    def _share(self, held: socket.socket, setting: str, flag: str) -> None:
        """Let further sockets of this user listen on the port.

        It was bound without SO_REUSEPORT, so nothing listens there yet. Another `baton up` may have bound it for its
        own front proxies, which do not listen before they can serve: both would share the port in silence. So each
        holds a name that is given away once in a network namespace, as ports are. What is left: another program of this
        user that sets SO_REUSEPORT on purpose; and a cluster that starts at the same time on the same port, but for
        all addresses where this one is for a single one.
        """
        host, port = held.getsockname()[:2]
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._kept.append(claim)
        try:
            claim.bind(f"\0baton-{host}-{port}")
        except OSError as error:
            raise _refusal(host, port, setting, flag, "another `baton up` has it") from error
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def _keep(self, host: str, port: int, setting: str, flag: str) -> socket.socket:
        kept = _bound(host, port, setting, flag)
        self._kept.append(kept)
        return kept

    def _set(self, process_id: str, setting: str, held: socket.socket) -> None:
        self._settings.setdefault(process_id, []).append(f"{setting}={_port_of(held)}")


def _bound(host: str, port: int, setting: str, flag: str, *, shared: bool = False) -> socket.socket:
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As servers do: a port counts as free when its last connections are closing.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise _refusal(host, port, setting, flag, error.strerror) from error
    return held


def _port_of(held: socket.socket) -> int:
    port: int = held.getsockname()[1]
    return port


def _refusal(host: str, port: int, setting: str, flag: str, why: str | None) -> StartError:
    how = f"{flag}, or 0 for any free one"
    return StartError(f"cannot listen on {host}:{port} ({setting}): {why}; choose another with {how}")
