"""Lets few requests be rendered in one turn of the event loop. The others wait, in order."""

from __future__ import annotations

import asyncio

RENDERED_AT_ONCE = 16
"""About 10 ms of work. The questions to the scheduler of so many requests still share one message: with 4 instead, a
request of a burst takes a tenth more CPU."""


class RenderTurns:
    """Of a burst, the first requests get their first tokens while the last are still waiting to be rendered.

    The event loop alone takes each step for all requests before the next step, so that the first waits for the last.
    """

    def __init__(self, at_once: int = RENDERED_AT_ONCE) -> None:
        self._free = asyncio.Semaphore(at_once)

    async def begin(self) -> RenderTurn:
        """Wait for a turn. Each must be ended."""
        await self._free.acquire()
        return RenderTurn(self._free)


class RenderTurn:
    """One request is being rendered."""

    __slots__ = ("_free",)

    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free: asyncio.Semaphore | None = free

    def end(self) -> None:
        """It is rendered, or never will be. Idempotent."""
        if self._free is not None:
            # Not at once: what came meanwhile from workers and the scheduler goes first.
            asyncio.get_running_loop().call_soon(self._free.release)
            self._free = None
