"""Leases whose end their engine should know already, told to it all the same, many at once and a moment later.

A reader that failed may still say that it has the KV: then no transfer layer tells the holder, which would keep it
until its lease ran out. A message for every lease would cost a step of the engine each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class ReleaseBatcher:
    """What was added is released together ``delay_s`` after the first of it."""

    def __init__(self, release: Callable[[list[str]], Awaitable[None]], delay_s: float) -> None:
        self._release = release
        self._delay_s = delay_s
        self._leases: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Future[None] | None = None

    def add(self, lease_id: str) -> None:
        """Release this lease too."""
        self._leases.append(lease_id)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._due)

    def close(self) -> None:
        """Nothing is released any more: the engine goes, and all it holds."""
        if self._timer is not None:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        leases, self._leases = self._leases, []
        self._task = asyncio.ensure_future(self._release(leases))
