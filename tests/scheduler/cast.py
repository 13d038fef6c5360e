"""Workers, plans and a core with short names, for the scheduler's tests. Asserts nothing."""

from __future__ import annotations

import itertools
from typing import Any

from runtime.roles import WorkerRole
from scheduler.api.actions import Action
from scheduler.api.events import Event, FrontJoined, PlanRequested, WorkerJoined, WorkerLoadReported
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.cluster.latency_model import LatencyModel, LearntLaw
from scheduler.cluster.worker import Worker
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore

FRONT = 1000
BLOCK_TOKENS = 32


def worker_info(worker_id: str, role: WorkerRole | None = None, **changes: Any) -> WorkerInfo:
    """A worker called p… prefills and one called d… decodes, unless told otherwise."""
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "role": role or ("prefill" if worker_id.startswith("p") else "decode"),
        "address": f"{worker_id}:1",
        "epoch": 1,
        "model": "tiny",
        "layout_fingerprint": "same",
        "block_size_tokens": BLOCK_TOKENS,
        "kv_blocks_total": 100,
        "engine_version": "fake",
        **changes,
    }
    return WorkerInfo(**fields)


def ready(**changes: Any) -> WorkerLoad:
    """The load of a ready worker."""
    return WorkerLoad(state=WorkerState.READY, **changes)


def worker(worker_id: str, load: WorkerLoad | None = None, **changes: Any) -> Worker:
    """A worker outside of any core, ready and idle unless told otherwise."""
    made = Worker(worker_info(worker_id, **changes), session=1, now_s=0.0, latency=LatencyModel(LearntLaw()))
    made.report(load or ready(), 0.0, 0.1)
    return made


class Stage:
    """A core with a clock and one front proxy."""

    def __init__(self, **config: Any) -> None:
        self.core = SchedulerCore(SchedulerParameters(**config))
        self.now_s = 0.0
        self._sessions = itertools.count(1)
        self.do(FrontJoined(session=FRONT, front_proxy_id="front-0"))

    def do(self, event: Event) -> list[Action]:
        """Let the core handle it, and check its invariants."""
        actions = list(self.core.handle(event, self.now_s))
        self.core.check()
        return actions

    def join(self, worker_id: str, role: WorkerRole | None = None, **changes: Any) -> list[Action]:
        """Register a worker on a new stream."""
        return self.do(WorkerJoined(session=next(self._sessions), info=worker_info(worker_id, role, **changes)))

    def report(self, worker_id: str, load: WorkerLoad | None = None) -> list[Action]:
        """Report a load, by default ready and idle."""
        session = self.core.cluster.workers[worker_id].session
        return self.do(WorkerLoadReported(session=session, worker_id=worker_id, load=load or ready()))

    def enter(self, worker_id: str, role: WorkerRole | None = None, **changes: Any) -> None:
        """Register and report ready."""
        self.join(worker_id, role, **changes)
        self.report(worker_id)


def question(plan_id: int, **changes: Any) -> PlanRequested:
    """A question: one tenth of a worker, unless told otherwise."""
    fields = {"session": FRONT, "request_id": f"r{plan_id}", "prompt_tokens": 288, "output_tokens_max": 32, **changes}
    return PlanRequested(plan_id=plan_id, **fields)
