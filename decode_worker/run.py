"""Starts a decode worker: the shared body with the decode role. Never serves by itself."""

from __future__ import annotations

from decode_worker.config import DecodeWorkerConfig
from decode_worker.role import DecodeRole
from engine import factory
from engine.config import EngineConfig
from engine.protocol import Engine, EngineInfo
from worker import run as worker_run
from worker.config import WorkerConfig
from worker.run import Ready


async def run(engine: EngineConfig, worker: WorkerConfig, role: DecodeWorkerConfig, ready: Ready) -> None:
    """Serve until a signal; see ``worker.run.run``."""

    async def start_engine(worker_id: str) -> Engine:
        return await factory.start(engine, worker_id=worker_id, role="decode")

    def make_role(info: EngineInfo, worker_id: str) -> DecodeRole:
        return DecodeRole(role, info, worker_id)

    await worker_run.run(
        role="decode",
        start_engine=start_engine,
        make_role=make_role,
        config=worker,
        ready=ready,
    )
