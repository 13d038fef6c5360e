"""Receives from a zmq socket in asyncio with one callback a message. Does not read the messages.

zmq.asyncio spends two futures, two turns of the event loop and eight enum operations on a message that one engine
process sends every few milliseconds. For a worker that only passes tokens on, that was a fifth of its CPU (measured).
"""

from __future__ import annotations

import asyncio
from typing import Any

import zmq
import zmq.asyncio


class FastZmqReceiver:
    """Takes the place of ``recv_multipart`` and ``close`` of a socket on which asyncio has received nothing before.

    Make it in the event loop in which the socket will be read, by one reader. Closing the socket ends it.
    """

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._loop = asyncio.get_running_loop()
        # The same zmq socket without asyncio around it.
        self._plain: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        self._fd: int = self._plain.fileno()
        self._close = socket.close
        self._waiter: asyncio.Future[None] | None = None
        socket.recv_multipart = self.recv_multipart  # type: ignore[method-assign]
        socket.close = self.close  # type: ignore[method-assign]
        self._loop.add_reader(self._fd, self._readable)

    async def recv_multipart(self, flags: int = 0, copy: bool = True, track: bool = False) -> list[Any]:
        """The next message's frames. Raises zmq.ZMQError once the socket is closed."""
        assert not flags, flags
        assert self._waiter is None, "one reader"
        while True:
            try:
                return self._plain.recv_multipart(zmq.DONTWAIT, copy=copy, track=track)
            except zmq.Again:
                pass
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def close(self, linger: int | None = None) -> None:
        """Stop watching, before the descriptor can become another's; then close."""
        if not self._plain.closed:
            self._loop.remove_reader(self._fd)
        self._close(linger)

    def _readable(self) -> None:
        # Reading EVENTS clears the signal. Otherwise the descriptor would stay readable for ever.
        arrived = self._plain.get(zmq.EVENTS) & zmq.POLLIN  # type: ignore[arg-type, operator] # a number
        if arrived and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
