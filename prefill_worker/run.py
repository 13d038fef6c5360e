"""Starts a prefill worker: the shared body with the prefill role. Never serves by itself."""

from __future__ import annotations

from engine import factory
from engine.config import EngineConfig
from engine.protocol import Engine, EngineInfo
from prefill_worker.config import PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from worker import run as worker_run
from worker.config import WorkerConfig
from worker.run import Ready


async def run(engine: EngineConfig, worker: WorkerConfig, role: PrefillWorkerConfig, ready: Ready) -> None:
    """Serve until a signal; see ``worker.run.run``."""

    async def start_engine(worker_id: str) -> Engine:
        return await factory.start(engine, worker_id=worker_id, role="prefill")

    def make_role(info: EngineInfo, worker_id: str) -> PrefillRole:
        return PrefillRole(role, info, worker_id)

    await worker_run.run(
        role="prefill",
        start_engine=start_engine,
        make_role=make_role,
        config=worker,
        ready=ready,
    )
