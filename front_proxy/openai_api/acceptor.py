"""Accepts HTTP connections, and tells those apart for which there are no descriptors left. Reads nothing of them."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

import structlog

from front_proxy.config import FrontProxyLimits
from front_proxy.gateway.metrics import CONNECTIONS_REFUSED
from runtime.process.open_files import open_files_max

_BACKLOG = 2048
# Others have their turn in between.
_ACCEPTED_AT_ONCE_MAX = 16
log = structlog.get_logger(__name__)


class Acceptor:
    """Accepts on one listener, until it is closed.

    The event loop's own server resets connections when descriptors run out, and says nothing.
    """

    def __init__(
        self,
        listener: socket.socket,
        new_protocol: Callable[[bool], asyncio.Protocol],
        *,
        descriptors_max: int,
        limits: FrontProxyLimits,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``new_protocol`` is told whether the connection is one too many."""
        self._tls = tls
        self._listener = listener
        self._new_protocol = new_protocol
        self._descriptors_max = descriptors_max
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._crowded = False
        """The last connection was one too many."""
        self._connecting: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._too_many, self._failures = (_Seldom(limits.refusals_logged_interval_s) for _ in range(2))

    def start(self) -> None:
        """Accept from now on, also the connections that came before."""
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accept no more."""
        if self._pause is not None:
            self._pause.cancel()
        elif self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    async def settled(self) -> None:
        """Wait until every accepted connection has its protocol."""
        if self._connecting:
            await asyncio.wait(self._connecting)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE_MAX):
            if self._crowded and self._connecting:
                # One at a time, so that those which are sent away hold few descriptors.
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._failed(error)
                return
            self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._crowded = connection.fileno() >= self._descriptors_max
        if self._crowded:
            CONNECTIONS_REFUSED.labels("descriptors").inc()
            if times := self._too_many.happened(self._loop.time()):
                log.warning("connections are refused: few open files are left", of=open_files_max(), times=times)
        task = self._loop.create_task(self._connect(connection, self._crowded), name="connect")
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket, crowded: bool) -> None:
        try:
            handshake_s = None if self._tls is None else self._limits.tls_handshake_timeout_s
            await self._loop.connect_accepted_socket(
                lambda: self._new_protocol(crowded), connection, ssl=self._tls, ssl_handshake_timeout=handshake_s
            )
        except OSError as error:
            connection.close()
            log.warning("an accepted connection did not start", why=str(error))

    def _failed(self, error: OSError) -> None:
        """The connection stays in the system's queue. It is tried again after a pause, not in every turn."""
        CONNECTIONS_REFUSED.labels("accept_failed").inc()
        if times := self._failures.happened(self._loop.time()):
            log.error("a connection could not be accepted", why=str(error), times=times)
        self._loop.remove_reader(self._listener.fileno())
        self._pause = self._loop.call_later(self._limits.accept_pause_s, self._resume)


class _Seldom:
    """Counts what happens, and says how often it did, once an interval."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next_s = float("-inf")
        self._times = 0

    def happened(self, now_s: float) -> int:
        """How often since it was last said; 0: too early to say so again."""
        self._times += 1
        if now_s < self._next_s:
            return 0
        times, self._times = self._times, 0
        self._next_s = now_s + self._interval_s
        return times
