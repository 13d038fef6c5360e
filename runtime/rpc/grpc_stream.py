"""gRPC's bidirectional calls as the streams of ``bidi_stream.py``. The only file that knows how a call breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, NoReturn, TypeVar

import grpc

from runtime.failures import Failure
from runtime.rpc.bidi_stream import Dial, StreamBroken
from runtime.rpc.grpc_errors import abort
from runtime.rpc.grpc_server import channel

In = TypeVar("In")
Out = TypeVar("Out")

_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it
# How gRPC says on either side that the peer is gone or the call is over.
_OVER = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


class GrpcClientStream(Generic[In, Out]):
    """A call as a ClientStream."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> In | None:
        """The next message."""
        message = await self._done(self._call.read())
        return None if message is _EOF else message

    async def write(self, message: Out) -> None:
        """Send one message."""
        await self._done(self._call.write(message))

    async def done_writing(self) -> None:
        """No message follows."""
        await self._done(self._call.done_writing())

    async def _done(self, operation: Awaitable[Any]) -> Any:
        """What it gives. When the peer has ended the stream before, its reason is the reason."""
        try:
            return await operation
        except _OVER as error:
            if not self._call.done():
                raise StreamBroken(str(error) or type(error).__name__) from error
            code, details = await self._call.code(), await self._call.details()
            raise StreamBroken(f"{code.name}: {details}") from error


class GrpcServerStream(Generic[In, Out]):
    """A servicer's context as a ServerStream."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context

    async def read(self) -> In | None:
        """The next message."""
        try:
            message: Any = await self._context.read()
        except _OVER as error:
            raise StreamBroken(str(error) or type(error).__name__) from error
        return None if message is _EOF else message

    async def write(self, message: Out) -> None:
        """Send one message."""
        try:
            await self._context.write(message)
        except _OVER as error:
            raise StreamBroken(str(error) or type(error).__name__) from error

    async def refuse(self, failure: Failure) -> NoReturn:
        """End the call with the status of ``failure`` and its details."""
        await abort(self._context, failure)


def grpc_dial(
    begin: Callable[[grpc.aio.Channel], Any], *, message_bytes_max: int, quick_keepalive: bool = False
) -> Dial:
    """Dials over a channel of its own for each stream. ``begin`` starts the call on the channel."""

    @contextlib.asynccontextmanager
    async def dial(address: str) -> AsyncIterator[GrpcClientStream[Any, Any]]:
        async with channel(address, message_bytes_max, quick_keepalive=quick_keepalive) as connection:
            call = begin(connection)
            try:
                yield GrpcClientStream(call)
            finally:
                call.cancel()

    return dial
