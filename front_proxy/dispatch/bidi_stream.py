"""One bidirectional gRPC stream: bounded outbox, writer and reader, which end together. Knows no message's meaning."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

Item = TypeVar("Item")
_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it


class Duplex(Generic[Item]):
    """Runs one stream from its opening to its end. Single use.

    ``encode`` turns an item into its message when it is written, not when it is queued, so that what a message says
    about time is true; None skips the item. ``on_message`` is called for every message that arrives.
    """

    def __init__(
        self,
        *,
        encode: Callable[[Item], Any],
        on_message: Callable[[Any], None],
        send_messages_max: int,
    ) -> None:
        assert send_messages_max > 0, send_messages_max
        self._encode = encode
        self._on_message = on_message
        self._send_messages_max = send_messages_max
        self._outbox: collections.deque[Item] = collections.deque()
        self._wake = asyncio.Event()
        self._end_reason: str | None = None
        self.silent = False
        """Whether it ended because the peer said nothing; one that refuses says something."""
        self._end = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the stream is over or about to be."""
        return self._end.is_set()

    def send(self, item: Item) -> bool:
        """Queue ``item``. False when the stream is over.

        Too much in the queue ends it: an item silently missing would leave the peer with work nobody waits for.
        """
        if self._end.is_set():
            return False
        if len(self._outbox) >= self._send_messages_max:
            self.end(f"more than {self._send_messages_max} messages wait to be sent")
            return False
        self._outbox.append(item)
        self._wake.set()
        return True

    def end(self, reason: str) -> None:
        """End the stream soon. The first reason stays."""
        if not self._end.is_set():
            self._end_reason = reason
            self._end.set()

    async def run(self, call: grpc.aio.StreamStreamCall[Any, Any], *, connect_timeout_s: float) -> str:
        """Carry messages until the stream ends for whatever reason, which is returned.

        The first message must arrive within ``connect_timeout_s``.
        """
        reader = asyncio.create_task(self._read(call, connect_timeout_s), name="duplex-reader")
        writer = asyncio.create_task(self._write(call), name="duplex-writer")
        ender = asyncio.create_task(self._wait_for_end(), name="duplex-ender")
        parts = (reader, writer, ender)
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._end.set()
            call.cancel()
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)
            self._outbox.clear()
            # Read in every case, so that no exception stays unretrieved when this task is being cancelled.
            reasons = [self._end_reason, *(_reason(part) for part in (reader, writer))]
        return next((reason for reason in reasons if reason), "the stream ended")

    async def _wait_for_end(self) -> None:
        await self._end.wait()

    async def _read(self, call: grpc.aio.StreamStreamCall[Any, Any], connect_timeout_s: float) -> None:
        try:
            async with asyncio.timeout(connect_timeout_s):
                message = await call.read()
        except TimeoutError:
            self.silent = True
            raise
        while message is not _EOF:
            self._on_message(message)
            message = await call.read()

    async def _write(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outbox:
                message = self._encode(self._outbox.popleft())
                if message is not None:
                    await call.write(message)


def _reason(part: asyncio.Task[None]) -> str | None:
    """Why a part ended by itself. A bug in ``on_message`` or ``encode`` is raised: it must not pass for a network's."""
    if part.cancelled():
        return None
    match part.exception():
        case None:
            return "the peer closed the stream"
        case grpc.aio.AioRpcError() as error:
            return f"{error.code().name}: {error.details()}"
        case TimeoutError():
            return "it did not answer in time"
        case grpc.aio.UsageError() | asyncio.InvalidStateError():
            return "the stream was over while a message was written"
        case error:
            raise error
