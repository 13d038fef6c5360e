"""The scheduler's core with the decoding of its messages, without gRPC: what one core of a CPU can plan.

Counted is the CPU time of all messages: questions, ends, reports as they would come in that time, and ticks. Making
them is not counted. How long a decision takes is by the clock on the wall: run it where nothing else does.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import psutil

from bench.planning.fleet import PREFILL_WAIT_MAX_S, REPORT_INTERVAL_S, Fleet
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.process import lifecycle
from scheduler import wire
from scheduler.api.actions import ReplyPlan
from scheduler.api.events import (
    Event,
    FrontJoined,
    Tick,
    WorkerBlocksReported,
    WorkerJoined,
    WorkerLoadReported,
)
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.routing.plan_log import PlanLog

IN_FLIGHT = 500
"""Plans that are not over."""
BATCH_PLANS = 100
"""Their messages are made together, so that the scheduler finds its data in the CPU's caches, as in its process."""
LEARNT_REPORTS = 10
"""Of each worker, before the first plan."""
_FRONT = 0


class BareCore:
    """One scheduler. Its clock is the CPU time that it took so far."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._config = SchedulerParameters(prefill_wait_max_s=PREFILL_WAIT_MAX_S)
        self._remote = 0
        self._core = SchedulerCore(self._config, random.Random(seed))
        self._log = PlanLog()
        self._clock_s = 1.0
        self._reporting = itertools.cycle(range(len(fleet.workers)))
        self._reported_s = self._ticked_s = self._clock_s
        self._plan_ids = itertools.count(1)
        # As a scheduler process does it when it begins to serve.
        lifecycle.settle_heap()
        self._core.handle(FrontJoined(session=_FRONT, front_proxy_id="bench"), self._clock_s)
        before_bytes = psutil.Process().memory_info().rss
        for number, info in enumerate(fleet.workers):
            joined = wire.worker_info(info)
            assert joined is not None
            self._core.handle(WorkerJoined(session=number + 1, info=joined), self._clock_s)
            for delta in fleet.snapshot(number):
                self._blocks(number, delta)
        self.blocks = len(self._core.prefixes.index)
        self.index_bytes = psutil.Process().memory_info().rss - before_bytes
        for number in [*range(len(fleet.workers))] * LEARNT_REPORTS:
            self._hear(self._report(number))

    def run(self, plans: int) -> dict[str, Any]:
        """Make so many plans, rounded up to whole batches."""
        decisions: list[float] = []
        began_s, wall_s, self._remote = self._clock_s, time.perf_counter, 0
        with _Collections() as collections:
            while len(decisions) < plans:
                batch = self._batch()
                batch_began_s = time.process_time()
                for do, argument in batch:
                    do_began_s = wall_s()
                    do(argument)
                    if do == self._plan:
                        decisions.append(wall_s() - do_began_s)
                self._clock_s += time.process_time() - batch_began_s
        plans = len(decisions)
        decisions.sort()
        return {
            "plans_per_s": round(plans / (self._clock_s - began_s)),
            "p50_us": round(decisions[plans // 2] * 1e6),
            "p99_us": round(decisions[plans * 99 // 100] * 1e6),
            "max_us": round(decisions[-1] * 1e6),
            "prefilled_apart": round(self._remote / plans, 2),
            "collections": collections.count,
            "collection_max_ms": round(collections.longest_s * 1e3, 2),
        }

    def _batch(self) -> list[tuple[Callable[[Any], object], Any]]:
        """What comes next: BATCH_PLANS questions and as many ends, and the reports that are due by now among them."""
        work: list[tuple[Callable[[Any], object], Any]] = []
        for plan_id in itertools.islice(self._plan_ids, BATCH_PLANS):
            if plan_id > IN_FLIGHT:
                work.append((self._end, self._fleet.end(plan_id - IN_FLIGHT).SerializeToString()))
            work.append((self._plan, self._fleet.question(plan_id).SerializeToString()))
        due = int((self._clock_s - self._reported_s) * len(self._fleet.workers) / REPORT_INTERVAL_S)
        self._reported_s += due * REPORT_INTERVAL_S / len(self._fleet.workers)
        others = len(work)
        for at in range(due):
            work.insert(at + at * others // due, (self._hear, self._report(next(self._reporting))))
        if self._ticked_s + self._config.tick_interval_s <= self._clock_s:
            self._ticked_s = self._clock_s
            work.append((self._handle, Tick()))
        return work

    def _report(self, worker: int) -> tuple[int, Sequence[bytes]]:
        return worker, [update.SerializeToString() for update in self._fleet.report(worker)]

    def _handle(self, event: Event) -> Any:
        return self._core.handle(event, self._clock_s)

    def _plan(self, asked: bytes) -> bytes:
        (answer,) = self._handle(wire.plan_requested(_FRONT, pb.PlanRequest.FromString(asked)))
        assert isinstance(answer, ReplyPlan), answer
        self._remote += answer.prefill is not None
        self._log.remember(answer, self._clock_s)
        return wire.plan(answer).SerializeToString()

    def _end(self, data: bytes) -> None:
        ended = wire.request_ended(_FRONT, pb.RequestEnded.FromString(data))
        self._handle(ended)
        self._log.end(ended)

    def _hear(self, report: tuple[int, Sequence[bytes]]) -> None:
        number, updates = report
        worker_id = self._fleet.workers[number].worker_id
        for data in updates:
            update = pb.WorkerUpdate.FromString(data)
            match update.WhichOneof("message"):
                case "blocks":
                    self._blocks(number, update.blocks)
                case "progress":
                    self._handle(wire.worker_progress(number + 1, worker_id, update.progress))
                case _:
                    load = wire.load(update.load)
                    self._handle(WorkerLoadReported(session=number + 1, worker_id=worker_id, load=load))

    def _blocks(self, number: int, message: pb.BlockDelta) -> None:
        info: cluster_pb2.WorkerInfo = self._fleet.workers[number]
        delta = wire.block_delta(message, info.epoch)
        asked = self._handle(WorkerBlocksReported(session=number + 1, worker_id=info.worker_id, delta=delta))
        assert not asked, "no delta is missing"


class _Collections:
    """Garbage collections while it is open, and the longest."""

    def __init__(self) -> None:
        self.count, self.longest_s, self._began_s = 0, 0.0, 0.0

    def __enter__(self) -> Self:
        gc.callbacks.append(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, _: object) -> None:
        if phase == "start":
            self._began_s = time.perf_counter()
            return
        self.count += 1
        self.longest_s = max(self.longest_s, time.perf_counter() - self._began_s)
