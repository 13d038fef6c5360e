"""How many plans a second the scheduler's core makes: ``python -m bench.plan_rate``. Starts no process, opens no port.

Each plan is a question, a load report and an end, as a busy cluster sends them.
"""

from __future__ import annotations

import random
import time
from collections import deque

from runtime.roles import WORKER_ROLES
from scheduler.api.actions import ReplyPlan
from scheduler.api.events import FrontJoined, PlanRequested, RequestEnded, WorkerJoined, WorkerLoadReported
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore

PLANS = 5_000
ROUNDS = 5
IN_FLIGHT = 500
SIZES = (1, 4, 16, 64)


def plans_per_s(pairs: int, plans: int = PLANS) -> float:
    """The rate with so many prefill and so many decode workers."""
    core, rng = SchedulerCore(SchedulerConfig(), random.Random(1)), random.Random(2)
    core.handle(FrontJoined(session=1, front_proxy_id="bench"), 0.0)
    workers = [(f"{role}-{index}", role) for role in WORKER_ROLES for index in range(pairs)]
    for session, (worker_id, role) in enumerate(workers, 2):
        info = WorkerInfo(
            worker_id=worker_id,
            role=role,
            address=f"{worker_id}:1",
            epoch=1,
            model="bench",
            layout_fingerprint="bench",
            block_size_tokens=16,
            kv_blocks_total=1_000_000,
            engine_version="bench",
        )
        core.handle(WorkerJoined(session=session, info=info), 0.0)
    running: deque[int] = deque()
    granted = 0
    began_s = time.process_time()
    for plan_id in range(plans):
        now_s = plan_id / 1000
        session = 2 + plan_id % len(workers)
        load = WorkerLoad(
            state=WorkerState.READY, requests_running=rng.randrange(50), prefill_tokens_queued=rng.randrange(1000)
        )
        if plan_id < len(workers) or plan_id % 2:
            core.handle(WorkerLoadReported(session=session, worker_id=workers[session - 2][0], load=load), now_s)
        event = PlanRequested(
            session=1, plan_id=plan_id, request_id=f"r{plan_id}", prompt_tokens=500, output_tokens_max=200
        )
        granted += sum(isinstance(action, ReplyPlan) for action in core.handle(event, now_s))
        running.append(plan_id)
        if len(running) > IN_FLIGHT:
            core.handle(RequestEnded(session=1, plan_id=running.popleft(), outcome="finished"), now_s)
    assert granted > plans / 2, granted
    return plans / (time.process_time() - began_s)


if __name__ == "__main__":
    for size in SIZES:
        rate = max(plans_per_s(size) for _ in range(ROUNDS))
        print(f"{size:3} prefill and {size:3} decode workers: {rate:8.0f} plans/s")
