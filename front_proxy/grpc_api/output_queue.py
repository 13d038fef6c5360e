"""What waits for the reader of one GenerateMany stream, in order, and how much of it makes a message."""

from __future__ import annotations

import asyncio
from collections import deque

from protos.inference.v1 import inference_pb2
from runtime.failures import Failure, FailureError, FailureKind

BATCH_BYTES_MAX = 1 << 20
"""Aim for one message: many clients accept no more than gRPC's own 4 MiB. A single response may be longer."""
FRAME_BYTES = 16
"""More than the tag and the length that a message costs inside of another one."""


class OutputQueue:
    """``count_max`` items and ``bytes_max`` bytes and an item may wait; refusals and aborts, all short, add to it."""

    def __init__(self, *, count_max: int, bytes_max: int, message_bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._message_bytes_max = message_bytes_max
        self._batch_bytes_max = min(BATCH_BYTES_MAX, message_bytes_max)
        self._items: deque[tuple[inference_pb2.GenerateResponse | inference_pb2.RequestError, int]] = deque()
        self._bytes = 0
        self._room = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    async def until_room(self) -> None:
        """Wait until one more may be added; what is added before the next await finds that room."""
        while len(self._items) >= self._count_max or self._bytes >= self._bytes_max:
            self._room.clear()
            await self._room.wait()

    def add(self, item: inference_pb2.GenerateResponse | inference_pb2.RequestError) -> None:
        """Append it. Raises FailureError (TOO_LARGE) for what no message can carry: the stream would end with it."""
        size = item.ByteSize() + FRAME_BYTES
        if size > self._message_bytes_max:
            message = (
                f"The output has {size} bytes; a message of this front proxy has at most {self._message_bytes_max}: "
                "ask for less at once (fewer log probabilities, stream)."
            )
            raise FailureError(Failure(kind=FailureKind.TOO_LARGE, message=message))
        self._items.append((item, size))
        self._bytes += size

    def take(self) -> inference_pb2.GenerateManyResponse:
        """The oldest, as many as fit into one message; at least one of those that wait."""
        batch = inference_pb2.GenerateManyResponse()
        taken = 0
        while self._items and (not taken or taken + self._items[0][1] <= self._batch_bytes_max):
            item, size = self._items.popleft()
            taken += size
            if isinstance(item, inference_pb2.RequestError):
                batch.errors.append(item)
            else:
                batch.outputs.append(item)
        self._bytes -= taken
        self._room.set()
        return batch
