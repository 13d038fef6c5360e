"""The watch over an engine goes on whatever becomes of its pings."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from worker.engine_health import EngineHealth

WAIT_S = 10.0


class Engine:
    """Lives, does nothing, and cancels or fails every ping."""

    def __init__(self, *, cancels: bool) -> None:
        self.pings = 0
        self._cancels = cancels

    def load(self) -> Any:
        return SimpleNamespace(steps=0)

    async def check_health(self) -> None: ...

    async def ping(self) -> None:
        self.pings += 1
        if self._cancels:
            raise asyncio.CancelledError
        raise RuntimeError("not now")


@pytest.mark.parametrize("cancels", [True, False])
async def test_a_ping_that_is_cancelled_is_no_answer_and_does_not_end_the_watch(cancels: bool) -> None:
    lost, engine = asyncio.Event(), Engine(cancels=cancels)
    core: Any = SimpleNamespace(
        engine=engine,
        config=SimpleNamespace(engine_stall_timeout_s=0.2),
        limits=SimpleNamespace(health_interval_s=0.01),
        now_s=asyncio.get_running_loop().time,
        engine_lost=lost,
        engine_silent_s=0.0,
        stall_engine=lambda _silent_s: lost.set(),
    )
    watch = asyncio.create_task(EngineHealth(core).run())
    if cancels:
        await asyncio.wait_for(asyncio.gather(lost.wait(), watch), WAIT_S)
    else:
        async with asyncio.timeout(WAIT_S):
            while engine.pings < 2:
                await asyncio.sleep(0.01)
        assert not watch.done() and not lost.is_set(), "a refusal is an answer"
        lost.set()
        await asyncio.wait_for(watch, WAIT_S)
