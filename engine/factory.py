"""Starts the configured engine. Imports an engine only when it is asked for; knows nothing of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from engine.config import EngineConfig
from engine.protocol import Engine
from kv_transfer.tiers.config import Tier


async def start(
    config: EngineConfig,
    *,
    worker_id: str,
    role: Literal["prefill", "decode"],
    host: str = "127.0.0.1",
    advertise_host: str = "",
    tiers: Sequence[Tier] = (),
) -> Engine:
    """A running engine that has served a first request.

    Raises EngineDead when it does not come up in time, and ValueError for settings that cannot work. ``role`` names the
    engine in logs; engines of both roles are alike, so that a worker can change role. The engine listens on
    ``host`` for other engines, which reach it by ``advertise_host`` (empty: ``host``). The fake engine has no
    ``tiers``.
    """
    match config.kind:
        case "fake":
            from engine.fake.engine import FakeEngine

            return await FakeEngine.start(config, worker_id=worker_id)
        case "vllm":
            from engine.vllm.engine import VllmEngine

            return await VllmEngine.start(
                config, worker_id=worker_id, role=role, host=host, advertise_host=advertise_host, tiers=tiers
            )
