"""Messages on their way to one peer: bounded, in order, with one seat for the newest view. Knows no transport.

Each message is a list with one entry (``FrontUpdates``). What waits together is merged into one list and travels in one
write, because a write over gRPC costs each end about 100 us whatever its size. After a pause a message leaves at once.
"""

from __future__ import annotations

import asyncio
import operator
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import Dial, Stream, StreamBroken, converse, first

M = TypeVar("M")
END_TIMEOUT_S = 10.0
"""Time that the parts of a stream have to end after one of them has ended."""
BATCH_MESSAGES_MAX = 128
"""Messages in one write. A peer handles a list in one turn of its event loop, which must not take long."""
BATCH_BYTES_MAX = 64 * 1024
"""Bytes in one write, about. A single message may be longer, and every peer accepts far more."""
WRITE_INTERVAL_S = 0.002
"""Time between two writes to one peer, if nothing else makes it longer: what arises in it shares the second one."""
PATIENCE_S = 0.005
"""Wait of a patient message for another one that it may leave with."""


class SendQueue(Generic[M]):
    """Any code of the event loop puts; one writer takes.

    The queue closes once. ``failure`` says why, when this side closed it. ``encode`` makes an item's message when it is
    taken, not when it is put, so that what the message says about time is true; None skips the item. ``weigh`` says how
    many bytes that will be, about.
    """

    def __init__(
        self,
        messages_max: int,
        encode: Callable[[M], Any] = lambda message: message,
        weigh: Callable[[M], int] = operator.methodcaller("ByteSize"),
    ) -> None:
        assert messages_max > 0, messages_max
        self.failure: Failure | None = None
        self._messages_max = messages_max
        self._encode = encode
        self._weigh = weigh
        self._messages: deque[M] = deque()
        self._view: M | None = None
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()
        self._later: asyncio.TimerHandle | None = None
        # Whether what waits is more than patient messages and a view: those make nothing behind them wait.
        self._hurried = False
        # Before this time, on the loop's clock, nothing is taken.
        self._pause_until_s = float("-inf")

    @property
    def closed(self) -> bool:
        """Whether nothing more will be delivered."""
        return self._closed.is_set()

    def put(self, message: M, *, patient: bool = False) -> bool:
        """Queue a message; False when the queue is closed.

        A message too many closes the queue: without it the peer could not tell what is missing. ``patient``: it leaves
        with the next message that is not, or after ``PATIENCE_S``.
        """
        if self._closed.is_set():
            return False
        if len(self._messages) >= self._messages_max:
            text = f"{self._messages_max} messages wait for this peer, which does not read them."
            self.close(Failure(kind=FailureKind.EXHAUSTED, message=text))
            return False
        self._messages.append(message)
        if not patient:
            self._hurried = True
            self._changed.set()
        elif self._later is None and not self._changed.is_set():
            self._later = asyncio.get_running_loop().call_later(PATIENCE_S, self._changed.set)
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

    def take_now(self) -> Any | None:
        """What waits, in order, as one message; None if nothing does. What does not fit stays queued."""
        waiting, taken, size_bytes = self._messages, list[Any](), 0
        if self._view is not None:
            # First: views are throttled, so they hold nothing up.
            waiting.appendleft(self._view)
            self._view = None
        while waiting and len(taken) < BATCH_MESSAGES_MAX:
            # A single waiting message, the usual case at low load, is not weighed.
            if taken or len(waiting) > 1:
                size_bytes += self._weigh(waiting[0])
                if taken and size_bytes > BATCH_BYTES_MAX:
                    break
            if (message := self._encode(waiting.popleft())) is not None:
                taken.append(message)
        if len(taken) < 2:
            return taken[0] if taken else None
        merged = type(taken[0])()
        for message in taken:
            merged.MergeFrom(message)
        return merged

    async def take(self) -> Any | None:
        """What waits, as soon as something does that is not patient; None once the queue is closed."""
        loop = asyncio.get_running_loop()
        while True:
            await self._changed.wait()
            if (pause_s := self._pause_until_s - loop.time()) > 0:
                await asyncio.sleep(pause_s)
            if self._closed.is_set():
                return None
            self._changed.clear()
            if self._later is not None:
                self._later.cancel()
                self._later = None
            message = self.take_now()
            if self._messages:
                # What found no room follows at once.
                self._changed.set()
            elif self._hurried:
                self._pause_until_s, self._hurried = loop.time() + WRITE_INTERVAL_S, False
            if message is not None:
                return message

    async def write_to(self, stream: Stream[Any, Any]) -> None:
        """Write what is put, until the queue is closed."""
        while (message := await self.take()) is not None:
            await stream.write(message)


async def exchange(
    dial: Dial,
    address: str,
    queue: SendQueue[M],
    *,
    opening: Any,
    on_message: Callable[[Any], None],
    first_timeout_s: float,
) -> StreamBroken:
    """Dial, and carry messages both ways until the stream ends for whatever reason. Closes the queue; returns why.

    ``opening`` is written before anything of the queue. ``first_timeout_s`` bounds the wait for the first message.
    """

    async def read(stream: Stream[Any, Any]) -> None:
        on_message(await first(stream, first_timeout_s))
        while (message := await stream.read()) is not None:
            on_message(message)

    async def write(stream: Stream[Any, Any]) -> None:
        await stream.write(opening)
        await queue.write_to(stream)

    ended = StreamBroken("the peer closed the stream")
    try:
        async with dial(address) as stream:
            await converse(read(stream), write(stream), queue.wait_closed(), end_timeout_s=END_TIMEOUT_S)
    except StreamBroken as broken:
        ended = broken
    finally:
        queue.close()
    return ended if queue.failure is None else StreamBroken(queue.failure.message, silent=ended.silent)
