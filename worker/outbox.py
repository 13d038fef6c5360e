"""Batches everything one engine step made for one front proxy into one message. Never talks to a network.

An engine step gives out all of its outputs in one turn of the event loop. Whoever waits in ``next_step`` is woken one
turn later and so finds the whole step. While a message is being written the next ones gather, and plain tokens of one
request become one delta, so a slow reader gets fewer, larger messages, up to a bound that is an error to cross.

Engines of small models make a step every millisecond or two, faster than anybody reads: tokens that nothing waits for
are held until ``interval_s`` after the message before. A first token, an end or a failure never waits.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from protos.worker.v1 import worker_pb2 as pb
from worker.wire import TOKEN_BYTES, size_estimate_bytes


class OutboxOverflow(Exception):
    """The front proxy reads more slowly than its requests produce."""


class Outbox:
    """Deltas on their way to one front proxy, oldest first."""

    def __init__(
        self,
        *,
        deltas_max: int,
        bytes_max: int,
        step_deltas_max: int,
        step_bytes_max: int,
        interval_s: float,
    ) -> None:
        assert deltas_max >= 1
        assert bytes_max >= 1
        assert step_deltas_max >= 1
        assert step_bytes_max >= 1
        assert interval_s >= 0
        self._deltas_max = deltas_max
        self._bytes_max = bytes_max
        self._step_deltas_max = step_deltas_max
        self._step_bytes_max = step_bytes_max
        self._interval_s = interval_s
        self._waiting: deque[pb.Delta] = deque()
        # By slot: its last delta, while that may still grow.
        self._open: dict[int, pb.Delta] = {}
        self._bytes = 0
        self._loop = asyncio.get_running_loop()
        self._flush_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_s = -math.inf
        self._ready = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def bytes_waiting(self) -> int:
        """About how much memory the waiting deltas take."""
        return self._bytes

    def append(self, delta: pb.Delta) -> None:
        """Add one delta, which leaves at once. Raises OutboxOverflow beyond the bounds; once closed, drops it."""
        if self._closed:
            return
        self._open.pop(delta.slot, None)
        self._add(delta, size_estimate_bytes(delta))
        self._flush_soon()

    def append_tokens(self, slot: int, token_ids: list[int]) -> None:
        """Add tokens of a request that go on; they may wait for ``interval_s``. Raises as ``append`` does."""
        if self._closed:
            return
        if (delta := self._open.get(slot)) is None:
            delta = pb.Delta(slot=slot, token_ids=token_ids)
            self._add(delta, size_estimate_bytes(delta))
            self._open[slot] = delta
        else:
            self._make_room(more_bytes=TOKEN_BYTES * len(token_ids))
            delta.token_ids.extend(token_ids)
        if self._timer is None and not self._flush_scheduled:
            wait_s = self._flushed_s + self._interval_s - self._loop.time()
            if wait_s > 0:
                self._timer = self._loop.call_later(wait_s, self._flush)
            else:
                self._flush_soon()

    def _add(self, delta: pb.Delta, size: int) -> None:
        if len(self._waiting) >= self._deltas_max:
            raise self._overflow()
        self._make_room(more_bytes=size)
        self._waiting.append(delta)

    def _make_room(self, *, more_bytes: int) -> None:
        if self._bytes + more_bytes > self._bytes_max:
            raise self._overflow()
        self._bytes += more_bytes

    def _overflow(self) -> OutboxOverflow:
        return OutboxOverflow(f"{len(self._waiting)} deltas ({self._bytes} bytes) wait for this front proxy")

    async def next_step(self) -> pb.StepOutputs | None:
        """Wait for deltas that are due and take as many as one message may hold. None once it is closed."""
        await self._ready.wait()
        if self._closed:
            return None
        assert self._waiting
        step = pb.StepOutputs()
        size = 0
        while self._waiting and len(step.deltas) < self._step_deltas_max:
            delta = self._waiting[0]
            delta_size = size_estimate_bytes(delta)
            if step.deltas and size + delta_size > self._step_bytes_max:
                break
            self._waiting.popleft()
            if self._open.get(delta.slot) is delta:
                del self._open[delta.slot]
            self._bytes -= delta_size
            size += delta_size
            step.deltas.append(delta)
        assert step.deltas
        assert self._bytes >= 0
        if self._waiting:
            self._ready.set()
        else:
            self._ready.clear()
        return step

    def close(self) -> None:
        """Drop what waits and wake the writer. Idempotent."""
        self._closed = True
        self._waiting.clear()
        self._open.clear()
        self._bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ready.set()

    def _flush_soon(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flushed_s = self._loop.time()
        if self._waiting:
            self._ready.set()
