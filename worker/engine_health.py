"""Checks a worker's engine: asks whether its process lives, and pings an engine that says nothing.

An engine reports every step, also a step that computes only a part of a prompt, and it answers a ping between two
steps. So a working engine is silent for its longest single step at most. One that is silent for longer has stalled.

A ping is also what wakes an engine at rest, and only then it asks its KV tiers what they have for it. So one with tiers
below host memory is pinged at every look, until it has taken no step for a while.
"""

from __future__ import annotations

import asyncio
import contextlib

from engine.protocol import EngineDead
from runtime.timing.awake_clock import PauseAwareTimeout, Verdict
from worker.core import WorkerCore

# How long after its last step. What its tiers still have to do makes each ping a step, so a longer write goes on.
_TIERS_S = 30.0


class EngineHealth:
    """The watch over one engine, from the moment that its worker serves."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core
        self._steps = core.engine.load().steps
        self._stepped_s = core.now_s()
        self._ping: asyncio.Task[None] | None = None
        config, limits = core.config, core.limits
        self._interval_s = limits.health_interval_s
        self._timeout: PauseAwareTimeout | None = None
        if config.engine_stall_timeout_s:
            # Ten looks within the timeout, so that a short one is kept.
            self._interval_s = min(limits.health_interval_s, config.engine_stall_timeout_s / 10)
            self._timeout = PauseAwareTimeout(
                timeout_s=config.engine_stall_timeout_s, interval_s=self._interval_s, now_s=core.now_s()
            )

    async def run(self) -> None:
        """Look every ``health_interval_s``, or more often, until the engine is lost."""
        core = self._core
        try:
            while not core.engine_lost.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await core.engine_lost.wait()
                        return
                try:
                    await core.engine.check_health()
                except EngineDead as error:
                    core.lose_engine(f"({error})")
                else:
                    self._look()
        finally:
            if self._ping is not None:
                self._ping.cancel()

    def _look(self) -> None:
        load, now_s = self._core.engine.load(), self._core.now_s()
        heard, self._steps = load.steps != self._steps, load.steps
        if heard:
            self._stepped_s = now_s
        if self._ping is not None and self._ping.done():
            # Any reply proves liveness, including an error; EngineDead is reported by check_health. A ping that the
            # engine's client cancelled is no reply: exception() would raise its CancelledError here.
            heard = heard or not (self._ping.cancelled() or isinstance(self._ping.exception(), EngineDead))
            self._ping = None
        asks = now_s - self._stepped_s < _TIERS_S and any(tier.name != "host" for tier in load.tiers)
        if self._timeout is not None:
            verdict = self._timeout.look(heard=heard, now_s=now_s)
            self._core.engine_silent_s = self._timeout.silent_s
            if verdict is Verdict.EXPIRED:
                self._core.stall_engine(self._timeout.silent_s)
                return
            asks = asks or verdict is Verdict.ASK
        # The ping before may be still unanswered.
        if asks and self._ping is None:
            self._ping = asyncio.create_task(self._core.engine.ping(), name="engine ping")
