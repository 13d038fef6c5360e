"""The watch over an engine goes on whatever becomes of its pings."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.tiers.status import TierStatus
from worker import engine_health
from worker.engine_health import EngineHealth

WAIT_S = 10.0


class Engine:
    """Lives, does nothing, and cancels every ping."""

    def load(self) -> Any:
        return SimpleNamespace(steps=0, tiers=())

    async def check_health(self) -> None: ...

    async def ping(self) -> None:
        raise asyncio.CancelledError


class TieredEngine:
    """At rest; takes a step at each of its first pings, as for what its tiers have to do."""

    def __init__(self, work: int, *tiers: str) -> None:
        self.work, self.pings = work, 0
        self.tiers = tuple(TierStatus(name=name) for name in tiers)

    def load(self) -> Any:
        return SimpleNamespace(steps=min(self.pings, self.work), tiers=self.tiers)

    async def check_health(self) -> None: ...

    async def ping(self) -> None:
        self.pings += 1


@pytest.mark.parametrize("stall_timeout_s", [0.0, 120.0])
@pytest.mark.parametrize(("tiers", "asked"), [(("host", "file"), True), (("host",), False)])
async def test_an_engine_at_rest_is_asked_while_its_tiers_have_something_to_do(
    monkeypatch: pytest.MonkeyPatch, tiers: tuple[str, ...], asked: bool, stall_timeout_s: float
) -> None:
    monkeypatch.setattr(engine_health, "_TIERS_S", 3.0)
    now_s = 0.0

    def tick() -> float:
        return now_s

    engine = TieredEngine(20, *tiers)
    core: Any = SimpleNamespace(
        engine=engine,
        config=SimpleNamespace(engine_stall_timeout_s=stall_timeout_s),
        limits=SimpleNamespace(health_interval_s=1.0),
        now_s=tick,
        engine_silent_s=0.0,
    )
    health = EngineHealth(core)
    for _ in range(29):
        now_s += 1.0
        health._look()
        await asyncio.sleep(0)
    # Longer than it is asked in vain: each step is a reason to ask again.
    assert engine.pings == (23 if asked else 0)


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
