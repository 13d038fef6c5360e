"""The watch over an engine goes on whatever becomes of its pings."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from worker.engine_health import EngineHealth

WAIT_S = 10.0


class Engine:
    """Lives, does nothing, and cancels every ping."""

    def load(self) -> Any:
        return SimpleNamespace(steps=0)

    async def check_health(self) -> None: ...

    async def ping(self) -> None:
        raise asyncio.CancelledError


async def test_a_ping_that_is_cancelled_is_no_answer_and_does_not_end_the_watch() -> None:
    lost = asyncio.Event()
    core: Any = SimpleNamespace(
        engine=Engine(),
        config=SimpleNamespace(engine_stall_timeout_s=0.2),
        limits=SimpleNamespace(health_interval_s=0.01),
        now_s=asyncio.get_running_loop().time,
        engine_lost=lost,
        engine_silent_s=0.0,
        stall_engine=lambda _silent_s: lost.set(),
    )
    await asyncio.wait_for(EngineHealth(core).run(), WAIT_S)
    assert lost.is_set()
