"""Batches everything one engine step made for one front proxy into one message. Never talks to a network.

An engine step gives out all of its outputs in one turn of the event loop. The writer that waits in ``next_step`` is
woken one turn later and so finds the whole step. While a message is being written the next ones gather, so a slow
reader gets fewer, larger messages. Above a bound this is an error.

Engines of small models make a step every millisecond or two, faster than a person reads. So tokens wait until
``interval_s`` has passed since the last message. A first token, an end or a failure never waits.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from protos.worker.v1 import worker_pb2 as pb
from worker.config import WorkerLimits
from worker.wire import TOKEN_BYTES, size_estimate_bytes

# About what one slot adds to a message beside its tokens.
SLOT_BYTES = 8


class OutputOverflow(Exception):
    """The front proxy reads more slowly than its requests produce."""


class OutputBatcher:
    """Deltas and tokens waiting for one front proxy. Each request has a slot number, and its output stays in order."""

    def __init__(self, limits: WorkerLimits, interval_s: float) -> None:
        self._limits = limits
        self._interval_s = interval_s
        # Each with its estimated size in bytes.
        self._deltas: deque[tuple[pb.Delta, int]] = deque()
        # Slot -> number of its waiting deltas.
        self._delta_slots: dict[int, int] = {}
        # Slot -> tokens older than the slot's waiting deltas.
        self._tokens: dict[int, list[int]] = {}
        self._bytes = 0
        self._loop = asyncio.get_running_loop()
        self._flush_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_s = -math.inf
        self._ready = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._deltas) + len(self._tokens)

    def append(self, delta: pb.Delta) -> None:
        """Add one delta, which leaves at once. Raises OutputOverflow beyond the bounds; once closed, drops it."""
        if self._closed:
            return
        self._add_delta(delta)
        self._flush_soon()

    def append_tokens(self, slot: int, token_ids: list[int]) -> None:
        """Add tokens from the middle of an output. They may wait for ``interval_s``. Raises as ``append`` does."""
        if self._closed or not token_ids:
            return
        if slot in self._delta_slots:
            # The receiver reads ``token_slots`` before ``deltas``. So these would overtake the older delta that waits.
            self._add_delta(pb.Delta(slot=slot, token_ids=token_ids))
        elif (tokens := self._tokens.get(slot)) is None:
            self._make_room(SLOT_BYTES + TOKEN_BYTES * len(token_ids), items=1)
            self._tokens[slot] = token_ids.copy()
        else:
            self._make_room(TOKEN_BYTES * len(token_ids), items=0)
            tokens += token_ids
        if self._timer is None and not self._flush_scheduled:
            wait_s = self._flushed_s + self._interval_s - self._loop.time()
            if wait_s > 0:
                self._timer = self._loop.call_later(wait_s, self._flush)
            else:
                self._flush_soon()

    def _add_delta(self, delta: pb.Delta) -> None:
        size = size_estimate_bytes(delta)
        self._make_room(size, items=1)
        self._deltas.append((delta, size))
        self._delta_slots[delta.slot] = self._delta_slots.get(delta.slot, 0) + 1

    def _make_room(self, more_bytes: int, *, items: int) -> None:
        if (
            items and len(self) >= self._limits.waiting_deltas_max
        ) or self._bytes + more_bytes > self._limits.waiting_bytes_max:
            raise OutputOverflow(f"{len(self)} deltas ({self._bytes} bytes) wait for this front proxy")
        self._bytes += more_bytes

    async def next_step(self) -> pb.StepOutputs | None:
        """Wait for what is due and take as much as one message may hold. None once it is closed."""
        await self._ready.wait()
        if self._closed:
            return None
        step = pb.StepOutputs()
        size = self._take_tokens(step) if self._tokens else 0
        if not self._tokens:
            # All tokens go before any delta: a delta may end a slot whose tokens still wait.
            self._take_deltas(step, size)
        assert step.token_slots or step.deltas
        assert self._bytes >= 0
        if not len(self):
            assert self._bytes == 0
            self._ready.clear()
        return step

    def _take_tokens(self, step: pb.StepOutputs) -> int:
        """Fill the columns; how many bytes they take."""
        limits = self._limits
        slots: list[int] = []
        counts: list[int] = []
        token_ids: list[int] = []
        size = 0
        for slot, tokens in self._tokens.items():
            weight = SLOT_BYTES + TOKEN_BYTES * len(tokens)
            if slots and (len(slots) == limits.step_deltas_max or size + weight > limits.step_bytes_max):
                break
            slots.append(slot)
            counts.append(len(tokens))
            token_ids += tokens
            size += weight
        if len(slots) == len(self._tokens):
            self._tokens.clear()
        else:
            for slot in slots:
                del self._tokens[slot]
        step.token_slots.extend(slots)
        step.token_ids.extend(token_ids)
        if counts.count(1) != len(counts):
            step.token_counts.extend(counts)
        self._bytes -= size
        return size

    def _take_deltas(self, step: pb.StepOutputs, size: int) -> None:
        limits = self._limits
        taken = len(step.token_slots)
        while self._deltas and taken < limits.step_deltas_max:
            delta, weight = self._deltas[0]
            if taken and size + weight > limits.step_bytes_max:
                break
            self._deltas.popleft()
            if (left := self._delta_slots[delta.slot] - 1) == 0:
                del self._delta_slots[delta.slot]
            else:
                self._delta_slots[delta.slot] = left
            self._bytes -= weight
            size += weight
            taken += 1
            step.deltas.append(delta)

    def close(self) -> None:
        """Drop what waits and wake the writer. Idempotent."""
        self._closed = True
        self._deltas.clear()
        self._delta_slots.clear()
        self._tokens.clear()
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
        if len(self):
            self._ready.set()
