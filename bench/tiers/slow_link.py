"""A relay in front of a server that lets through so many bytes a second: a slow S3."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_CHUNK_BYTES = 64 << 10


class _Pace:
    """Of all connections together, in one direction."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    async def passes(self, count: int) -> None:
        """Returns when so many bytes may go on."""
        now_s = time.monotonic()
        self._free_s = max(self._free_s, now_s) + count / self._bytes_per_s
        await asyncio.sleep(self._free_s - now_s)


@asynccontextmanager
async def slow_link(host: str, port: int, bytes_per_s: float) -> AsyncIterator[int]:
    """The relay's own port, on 127.0.0.1. Each direction has ``bytes_per_s``."""
    there, back = _Pace(bytes_per_s), _Pace(bytes_per_s)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(_pump(reader, far_writer, there), _pump(far_reader, writer, back))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pace: _Pace) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(_CHUNK_BYTES):
            await pace.passes(len(data))
            writer.write(data)
            await writer.drain()
    writer.close()
