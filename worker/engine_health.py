"""Looks after a worker's engine: asks whether its process lives, and pings one that says nothing. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib

from engine.protocol import EngineDead
from worker.core import WorkerBody
from worker.engine_watch import EngineWatch, Verdict


class EngineHealth:
    """The watch over one engine, from the moment that its worker serves."""

    def __init__(self, body: WorkerBody) -> None:
        self._body = body
        self._steps = body.engine.load().steps
        self._ping: asyncio.Task[None] | None = None
        config = body.config
        self._watch: EngineWatch | None = None
        if config.engine_stall_timeout_s:
            self._watch = EngineWatch(
                stall_timeout_s=config.engine_stall_timeout_s, interval_s=config.health_interval_s, now_s=body.now_s()
            )

    async def run(self) -> None:
        """Look every ``health_interval_s`` until the engine is lost."""
        body = self._body
        try:
            while not body.engine_lost.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(body.config.health_interval_s):
                        await body.engine_lost.wait()
                        return
                try:
                    await body.engine.check_health()
                except EngineDead as error:
                    body.lose_engine(f"({error})")
                else:
                    self._look()
        finally:
            if self._ping is not None:
                self._ping.cancel()

    def _look(self) -> None:
        if self._watch is None:
            return
        steps = self._body.engine.load().steps
        heard, self._steps = steps != self._steps, steps
        if self._ping is not None and self._ping.done():
            # Any answer will do, a refusal too; that it is dead, its health tells. One that the engine's
            # client cancelled is none, and its exception would be raised here and be taken for the end of this watch.
            heard = heard or not (self._ping.cancelled() or isinstance(self._ping.exception(), EngineDead))
            self._ping = None
        verdict = self._watch.look(heard=heard, now_s=self._body.now_s())
        self._body.engine_silent_s = self._watch.silent_s
        match verdict:
            case Verdict.WELL:
                pass
            case Verdict.ASK if self._ping is None:
                self._ping = asyncio.create_task(self._body.engine.ping(), name="engine ping")
            case Verdict.ASK:
                pass  # the one before is still unanswered, and the same answer will do
            case Verdict.STALLED:
                self._body.stall_engine(self._watch.silent_s)
