"""TCP relays between the processes of a cluster, which can cut, delay or black-hole one process's connections.

Each process connects through its target's relay: chaos gives out the relay's port as ``advertise_port``. A connection
belongs to two processes: the one behind the relay, and the one that has the socket at the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec
import psutil

HOST = "127.0.0.1"
_CHUNK_BYTES = 65_536
# Chunks under way in one direction; the sender waits for the rest, as on a wire.
_CHUNKS_MAX = 256
_RESET = struct.pack("ii", 1, 0)


class Disturbance(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to connections. A field's default is nothing."""

    cut: bool = False
    """Every connection is reset, and so is every new one."""
    delay_s: float = 0.0
    """Every byte comes so much later, each way."""
    blackhole: bool = False
    """Connections stay open and carry nothing; what was sent meanwhile arrives afterwards."""


class Route(msgspec.Struct, frozen=True):
    """``listener`` stands for a process. ``kept`` is bound to its own port, so that it can always listen there."""

    process_id: str
    listener: socket.socket
    kept: socket.socket


def port_of(bound: socket.socket) -> int:
    """The port that a socket is bound to."""
    return int(bound.getsockname()[1])


class _Connection:
    """Two sockets and what passes between them. ``client_port`` is the one at the far end of the accepted socket."""

    def __init__(self, target: str, client_port: int) -> None:
        self.target = target
        self.client_port = client_port
        self.writers: list[asyncio.StreamWriter] = []
        self.passing = asyncio.Event()
        self.passing.set()
        self.delay_s = 0.0
        self.was_cut = False

    def disturb(self, what: Disturbance) -> None:
        self.delay_s = what.delay_s
        if what.blackhole:
            self.passing.clear()
        if what.cut:
            self.was_cut = True
            self.reset()

    def heal(self) -> None:
        self.delay_s = 0.0
        self.passing.set()

    def reset(self) -> None:
        """End both sides with RST, not FIN: what is under way is lost, as when a network breaks."""
        for writer in self.writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one direction on until its end."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_MAX)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take(reader, held))
            group.create_task(self._give(held, writer))

    async def _take(self, reader: asyncio.StreamReader, held: asyncio.Queue[tuple[float, bytes]]) -> None:
        chunk = b"-"
        while chunk:
            await self.passing.wait()
            chunk = await reader.read(_CHUNK_BYTES)
            await held.put((asyncio.get_running_loop().time(), chunk))

    async def _give(self, held: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            came_s, chunk = await held.get()
            if (left_s := came_s + self.delay_s - loop.time()) > 0:
                await asyncio.sleep(left_s)
            await self.passing.wait()
            if not chunk:
                writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()


class Relays:
    """All relays of a cluster. ``start`` once, ``close`` once; one disturbance at a time."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes
        self._servers: list[asyncio.Server] = []
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # What happens to each connection at present, new ones included.
        self._disturb: Callable[[Sequence[_Connection]], Awaitable[None]] | None = None
        self.disturbed_connections = 0
        """Connections that were hit by any disturbance so far."""

    async def start(self) -> None:
        """Accept connections."""
        for route in self._routes:

            async def accepted(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, route: Route = route
            ) -> None:
                task = asyncio.current_task()
                assert task is not None
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                await self._relay(route, reader, writer)

            self._servers.append(await asyncio.start_server(accepted, sock=route.listener))

    async def close(self) -> None:
        """End everything and let the ports go."""
        for server in self._servers:
            server.close()
        for route in self._routes:
            route.listener.close()
            route.kept.close()
        for connection in tuple(self._open):
            connection.reset()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def disturbed(self, process_id: str, pid: int, what: Disturbance) -> AsyncIterator[None]:
        """Let ``what`` happen to all connections from and to a process while the block runs."""
        assert self._disturb is None, "one at a time"

        async def disturb(connections: Sequence[_Connection]) -> None:
            ports = await asyncio.to_thread(_ports_of, pid)
            for connection in connections:
                if connection.target == process_id or connection.client_port in ports:
                    self.disturbed_connections += 1
                    connection.disturb(what)

        self._disturb = disturb
        try:
            await disturb(tuple(self._open))
            yield
        finally:
            self._disturb = None
            for connection in self._open:
                connection.heal()

    async def _relay(self, route: Route, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(route.process_id, writer.get_extra_info("peername")[1])
        connection.writers.append(writer)
        self._open.add(connection)
        try:
            if (disturb := self._disturb) is not None:
                await disturb([connection])
                if self._disturb is None:
                    connection.heal()
            if connection.was_cut:
                return
            await connection.passing.wait()
            far_reader, far_writer = await asyncio.open_connection(HOST, port_of(route.kept))
            connection.writers.append(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(connection.carry(reader, far_writer))
                group.create_task(connection.carry(far_reader, writer))
        except* OSError:
            pass  # one side broke: the other one shall see it too
        finally:
            self._open.discard(connection)
            connection.reset()


def _ports_of(pid: int) -> set[int]:
    """Local ports of a process's TCP sockets; none where it is gone."""
    try:
        return {found.laddr.port for found in psutil.Process(pid).net_connections("tcp") if found.laddr}
    except psutil.Error:
        return set()
