"""One bidirectional stream, whatever carries it: what both ends may do with it, and how one end is driven.

No transport is known here. ``runtime/rpc/grpc_stream.py`` carries streams over gRPC, the simulation in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, NoReturn, Protocol, TypeVar

import structlog

from runtime.failures import Failure

log = structlog.get_logger(__name__)

In = TypeVar("In")
Received_co = TypeVar("Received_co", covariant=True)
Sent_contra = TypeVar("Sent_contra", contravariant=True)


class StreamBroken(Exception):
    """A stream ended, and not because both ends were done. ``silent``: the peer said nothing in time."""

    def __init__(self, why: str, *, silent: bool = False) -> None:
        super().__init__(why)
        self.silent = silent


class Stream(Protocol[Received_co, Sent_contra]):
    """One end of a stream. At most one task reads and one task writes at a time."""

    async def read(self) -> Received_co | None:
        """The next message; None when the peer has ended the stream well. Raises StreamBroken."""
        ...

    async def write(self, message: Sent_contra) -> None:
        """Send a message, which belongs to the stream from here on. Waits for a slow peer. Raises StreamBroken."""
        ...


class ClientStream(Stream[Received_co, Sent_contra], Protocol[Received_co, Sent_contra]):
    """The end that dialled. Leaving the context of its ``Dial`` cancels the stream."""

    async def done_writing(self) -> None:
        """Say that no message follows. Raises StreamBroken."""
        ...


class ServerStream(Stream[Received_co, Sent_contra], Protocol[Received_co, Sent_contra]):
    """The end that was dialled.

    When its handler returns, the stream ends well. When the peer goes away, the handler is cancelled; a read may return
    None just before.
    """

    async def refuse(self, failure: Failure) -> NoReturn:
        """End the stream with a failure. The handler ends here."""
        ...


Dial = Callable[[str], AbstractAsyncContextManager[ClientStream[Any, Any]]]
"""Opens a stream of one kind to an address. The simulation hands in its own network here."""


@contextlib.asynccontextmanager
async def answer_within(timeout_s: float) -> AsyncIterator[None]:
    """Raise a silent StreamBroken if the body, a read or a write, takes longer than ``timeout_s``."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise StreamBroken(f"it did not answer within {timeout_s:g} s", silent=True) from None


async def first(stream: Stream[In, Any], timeout_s: float) -> In:
    """The first message. Raises StreamBroken, which is ``silent`` when no message came within ``timeout_s``."""
    async with answer_within(timeout_s):
        message = await stream.read()
    if message is None:
        raise StreamBroken("the peer closed the stream")
    return message


async def converse(*parts: Coroutine[Any, Any, object], end_timeout_s: float) -> None:
    """Run the reader, the writer and whatever else may end a stream, until one of them ends. Then end the others.

    Raises the error of a part. If several failed, a bug goes before a StreamBroken, and then the order of the arguments
    decides. So put the reader first: it learns why the stream broke, and the writer only that it did.
    """
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # All at once and before any wait: this task may be cancelled again while it waits.
        running = {task for task in tasks if task.cancel()}
        if running:
            _, late = await asyncio.wait(running, timeout=end_timeout_s)
            if late:
                log.error("parts of a stream did not end in time", parts=len(late), waited_s=end_timeout_s)
        ended = [task for task in tasks if task.done() and not task.cancelled()]
        # Looked at on every way out, so that asyncio reports none of them as never retrieved.
        errors = [error for task in ended if (error := task.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, StreamBroken)):
        raise error
