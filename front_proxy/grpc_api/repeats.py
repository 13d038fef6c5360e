"""Whether a client makes a call again that brought nothing, since its front proxy ends or has ended."""

from __future__ import annotations

import asyncio

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

REPEATS_MAX = 3
"""Times in a row that one call is made again."""
REPEAT_WAIT_MAX_S = 5.0
"""Longest wait for another connection, each time."""
# How gRPC reports that a connection broke, that no process listens, or that the one that does takes no more calls.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Repeats:
    """Those of one call, whose answer may take ``timeout_s`` in all (None: any time)."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float | None = None) -> None:
        self._channel = channel
        self._clock = asyncio.get_running_loop().time
        self._due_s = None if timeout_s is None else self._clock() + timeout_s
        self._left = REPEATS_MAX

    def time_left_s(self) -> float | None:
        """What is left of ``timeout_s``."""
        return None if self._due_s is None else max(0.0, self._due_s - self._clock())

    def begin_anew(self) -> None:
        """The call brought something: what comes next is counted by itself."""
        self._left = REPEATS_MAX

    async def another(self) -> bool:
        """Whether to make the call again: not too often, and only over a connection that there is in time."""
        self._left -= 1
        if self._left < 0:
            return False
        left_s = self.time_left_s()
        try:
            async with asyncio.timeout(REPEAT_WAIT_MAX_S if left_s is None else min(left_s, REPEAT_WAIT_MAX_S)):
                # One that broke, or that its front proxy closes, is not used any more: this opens another.
                await self._channel.channel_ready()
        except TimeoutError:
            return False
        return True


def unanswered(error: grpc.aio.AioRpcError) -> bool:
    """Whether no front proxy refused the call: they say why, in details."""
    return error.code() in _LOST and details(error) is None


def stream_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether a stream of many requests ended before its client had said and heard everything."""
    # gRPC itself says INTERNAL to a client that was writing just then.
    internal = error.code() is grpc.StatusCode.INTERNAL and details(error) is None
    return internal or error.code() in _LOST


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """What a front proxy says of a failure; None: it comes from gRPC, or from a proxy on the way."""
    try:
        return rpc_status.from_call(error)  # type: ignore[arg-type] # the stubs do not know grpc.aio
    except ValueError:
        return None
