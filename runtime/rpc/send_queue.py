"""Messages on their way to one peer: bounded, with one seat for the newest view. Knows no transport."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import Dial, Stream, StreamBroken, converse, first

M = TypeVar("M")
END_TIMEOUT_S = 10.0
"""Time that the parts of a stream have to end after one of them has ended."""


class SendQueue(Generic[M]):
    """Any code of the event loop puts; one writer takes.

    The queue closes once. ``failure`` says why, when this side closed it.
    """

    def __init__(self, messages_max: int) -> None:
        assert messages_max > 0, messages_max
        self.failure: Failure | None = None
        self._messages_max = messages_max
        self._messages: deque[M] = deque()
        self._view: M | None = None
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether nothing more will be delivered."""
        return self._closed.is_set()

    def put(self, message: M) -> bool:
        """Queue a message; False when the queue is closed.

        A message too many closes the queue: without it the peer could not tell what is missing.
        """
        if self._closed.is_set():
            return False
        if len(self._messages) >= self._messages_max:
            text = f"{self._messages_max} messages wait for this peer, which does not read them."
            self.close(Failure(kind=FailureKind.EXHAUSTED, message=text))
            return False
        self._messages.append(message)
        self._changed.set()
        return True

    def show(self, view: M) -> None:
        """Deliver the newest view; an older one that was not taken yet is forgotten."""
        if not self._closed.is_set():
            self._view = view
            self._changed.set()

    def close(self, failure: Failure | None = None) -> None:
        """Deliver nothing more. The first call decides the failure."""
        if not self._closed.is_set():
            self._closed.set()
            self.failure = failure
            self._messages.clear()
            self._view = None
            self._changed.set()

    async def wait_closed(self) -> None:
        """Wait until the queue is closed."""
        await self._closed.wait()

    def take_now(self) -> M | None:
        """The next message, if one waits. A view goes first: views are throttled, so they hold nothing up."""
        if self._view is not None:
            view, self._view = self._view, None
            return view
        return self._messages.popleft() if self._messages else None

    async def take(self) -> M | None:
        """The next message; None once the queue is closed."""
        while True:
            if (message := self.take_now()) is not None:
                return message
            if self._closed.is_set():
                return None
            self._changed.clear()
            await self._changed.wait()


async def exchange(
    dial: Dial,
    address: str,
    queue: SendQueue[M],
    *,
    on_message: Callable[[Any], None],
    first_timeout_s: float,
    encode: Callable[[M], Any] = lambda message: message,
) -> StreamBroken:
    """Dial, and carry messages both ways until the stream ends for whatever reason. Closes the queue; returns why.

    ``encode`` turns an item of the queue into its message when it is written, not when it is queued, so that what a
    message says about time is true; None skips the item. ``first_timeout_s`` bounds the wait for the first message.
    """

    async def read(stream: Stream[Any, Any]) -> None:
        on_message(await first(stream, first_timeout_s))
        while (message := await stream.read()) is not None:
            on_message(message)

    async def write(stream: Stream[Any, Any]) -> None:
        while (item := await queue.take()) is not None:
            if (message := encode(item)) is not None:
                await stream.write(message)

    ended = StreamBroken("the peer closed the stream")
    try:
        async with dial(address) as stream:
            await converse(read(stream), write(stream), queue.wait_closed(), end_timeout_s=END_TIMEOUT_S)
    except StreamBroken as broken:
        ended = broken
    finally:
        queue.close()
    return ended if queue.failure is None else StreamBroken(queue.failure.message, silent=ended.silent)
