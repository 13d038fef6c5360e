"""Batches everything one engine step made for one front proxy into one message. Never talks to a network.

An engine step wakes all of its requests in the same turn of the event loop. Each appends its delta; whoever waits in
``next_step`` is woken one turn later and so finds the whole step. While a message is being written the next ones
gather, so a slow reader gets fewer, larger messages, up to a bound that is an error to cross.
"""

from __future__ import annotations

import asyncio
from collections import deque

from protos.worker.v1 import worker_pb2 as pb
from worker.wire import size_estimate_bytes


class OutboxOverflow(Exception):
    """The front proxy reads more slowly than its requests produce."""


class Outbox:
    """Deltas on their way to one front proxy, oldest first."""

    def __init__(self, *, deltas_max: int, bytes_max: int, step_deltas_max: int, step_bytes_max: int) -> None:
        assert deltas_max >= 1
        assert bytes_max >= 1
        assert step_deltas_max >= 1
        assert step_bytes_max >= 1
        self._deltas_max = deltas_max
        self._bytes_max = bytes_max
        self._step_deltas_max = step_deltas_max
        self._step_bytes_max = step_bytes_max
        self._waiting: deque[tuple[pb.Delta, int]] = deque()
        self._bytes = 0
        self._loop = asyncio.get_running_loop()
        self._flush_scheduled = False
        self._ready = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def bytes_waiting(self) -> int:
        """About how much memory the waiting deltas take."""
        return self._bytes

    def append(self, delta: pb.Delta) -> None:
        """Add one delta. Raises OutboxOverflow beyond the bounds; after ``close`` it is dropped."""
        if self._closed:
            return
        size = size_estimate_bytes(delta)
        if len(self._waiting) >= self._deltas_max or self._bytes + size > self._bytes_max:
            raise OutboxOverflow(f"{len(self._waiting)} deltas ({self._bytes} bytes) wait for this front proxy")
        self._waiting.append((delta, size))
        self._bytes += size
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    async def next_step(self) -> pb.StepOutputs | None:
        """Wait for deltas and take as many as one message may hold. None once it is closed."""
        while not self._waiting and not self._closed:
            self._ready.clear()
            await self._ready.wait()
        if self._closed:
            return None
        step = pb.StepOutputs()
        size = 0
        while self._waiting and len(step.deltas) < self._step_deltas_max:
            delta, delta_size = self._waiting[0]
            if step.deltas and size + delta_size > self._step_bytes_max:
                break
            self._waiting.popleft()
            self._bytes -= delta_size
            size += delta_size
            step.deltas.append(delta)
        assert step.deltas
        assert self._bytes >= 0
        return step

    def close(self) -> None:
        """Drop what waits and wake the writer. Idempotent."""
        self._closed = True
        self._waiting.clear()
        self._bytes = 0
        self._ready.set()

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._waiting:
            self._ready.set()
