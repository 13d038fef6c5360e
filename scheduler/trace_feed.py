"""One recording of traffic: requests that run, and records that wait for the client that follows it. Knows no gRPC."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from protos.scheduler.v1 import scheduler_pb2 as pb
from scheduler.api.actions import Action, ReplyRefusal
from scheduler.api.events import Event, FrontLeft, PlanRequested, RequestEnded
from scheduler.cluster.prompt_queue import PlanKey
from scheduler.queueing.wait_queue import class_of

HELD_BYTES_MAX = 64 * 1024 * 1024
"""Of one recording."""
RECORD_BYTES = 200
"""What a record takes beside its keys, about."""
BATCH_BYTES = 64 * 1024
"""As much is sent at once. A longer record goes alone."""


class TraceFeed:
    """Feed it what the core is fed and what it answers; ``take`` gives what has ended.

    A request is recorded by its first attempt, when that ended and gave output. One that a worker failed, or that was
    refused, has no length that could be replayed.
    """

    def __init__(self, began_s: float, held_bytes_max: int = HELD_BYTES_MAX) -> None:
        self.asked = 0
        self.dropped = 0
        self.full = asyncio.Event()
        """Set while a batch waits, and at the end."""
        self.closed = False
        self._began_s = began_s
        self._held_bytes_max = held_bytes_max
        self._held_bytes = self._waiting_bytes = 0
        self._open: dict[PlanKey, pb.TraceRecord] = {}
        self._waiting: deque[pb.TraceRecord] = deque()

    def follow(self, event: Event, actions: Iterable[Action], now_s: float) -> None:
        """Note what one event means for the recording, with what the core wants done."""
        match event:
            case PlanRequested():
                self._ask(event, now_s)
            case RequestEnded(session=session, plan_id=plan_id, outcome=outcome, output_tokens=output_tokens):
                self._end((session, plan_id), output_tokens if outcome != "failed" else 0)
            case FrontLeft(session=session):
                for key in [key for key in self._open if key[0] == session]:
                    self._end(key, 0)
            case _:
                pass
        for action in actions:
            if isinstance(action, ReplyRefusal):
                self._end((action.session, action.plan_id), 0)

    def take(self) -> list[pb.TraceRecord]:
        """The next batch of records, at least one if any waits."""
        batch: list[pb.TraceRecord] = []
        batch_bytes = 0
        while self._waiting and (not batch or batch_bytes + _bytes_of(self._waiting[0]) <= BATCH_BYTES):
            record = self._waiting.popleft()
            batch.append(record)
            batch_bytes += _bytes_of(record)
        self._held_bytes -= batch_bytes
        self._waiting_bytes -= batch_bytes
        if self._waiting_bytes < BATCH_BYTES and not self.closed:
            self.full.clear()
        return batch

    def close(self) -> None:
        """The scheduler leads no more, or stops."""
        self.closed = True
        self.full.set()

    def _ask(self, event: PlanRequested, now_s: float) -> None:
        if event.resumed:
            return
        self.asked += 1
        held_bytes = self._held_bytes + RECORD_BYTES + len(event.block_keys)
        if held_bytes > self._held_bytes_max:
            self.dropped += 1
            return
        self._held_bytes = held_bytes
        self._open[event.session, event.plan_id] = pb.TraceRecord(
            arrived_s=now_s - self._began_s,
            prompt_tokens=event.prompt_tokens,
            block_keys=event.block_keys,
            priority_class=class_of(event),
            tenant=event.tenant,
        )

    def _end(self, key: PlanKey, output_tokens: int) -> None:
        record = self._open.pop(key, None)
        if record is None:
            return
        if not output_tokens:
            self._held_bytes -= _bytes_of(record)
            return
        record.output_tokens = output_tokens
        self._waiting.append(record)
        self._waiting_bytes += _bytes_of(record)
        if self._waiting_bytes >= BATCH_BYTES:
            self.full.set()


def _bytes_of(record: pb.TraceRecord) -> int:
    return RECORD_BYTES + len(record.block_keys)
