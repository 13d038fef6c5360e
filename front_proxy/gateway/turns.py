"""How many requests begin in one turn of the event loop. Refuses none."""

from __future__ import annotations

import asyncio
from collections import deque

BEGINNINGS_MAX = 8
"""Each takes up to a millisecond, above all for its prompt. With fewer a turn, more messages carry what they ask."""


PAUSE_TURNS = 4
"""Turns of the loop between two groups of beginnings. A message that came or is to leave takes a few turns on its way
through the loop, and with beginnings in each of them it would wait for all of those."""


class Turns:
    """Of many requests that come at once, the first few go to the scheduler and to workers while the next ones begin.

    Without that, the first one's plan would leave when the last one's prompt is rendered.
    """

    def __init__(self, count_max: int = BEGINNINGS_MAX) -> None:
        self._count_max = count_max
        self._begun = 0
        self._pause_turns = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def begin(self) -> None:
        """Wait for a turn, in order of arrival."""
        loop = asyncio.get_running_loop()
        if self._begun == 0:
            self._pause(loop)
        elif self._begun >= self._count_max or self._waiting:
            waiter = loop.create_future()
            self._waiting.append(waiter)
            await waiter
            return
        self._begun += 1

    def _turn(self) -> None:
        """The next ones may begin, if this is their turn."""
        loop = asyncio.get_running_loop()
        if self._pause_turns:
            self._pause_turns -= 1
            loop.call_soon(self._turn)
            return
        self._begun = 0
        while self._waiting and self._begun < self._count_max:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._begun += 1
        if self._begun:
            self._pause(loop)

    def _pause(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pause_turns = PAUSE_TURNS
        loop.call_soon(self._turn)
