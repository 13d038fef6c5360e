"""Releases pulled leases in batches, a moment after their pull.

The transfer layer tells the holder of a pull, so most of these releases change nothing. But a reader that failed may
still report that it has the KV. Then the transfer layer tells nothing, and the holder would keep the KV until the lease
runs out. A message for each lease would cost one engine step each, so they go together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class ReleaseBatcher:
    """Releases the leases that were added together, ``delay_s`` after the first of them."""

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
        """Release nothing more. The engine ends, and everything it holds with it."""
        if self._timer is not None:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        leases, self._leases = self._leases, []
        self._task = asyncio.ensure_future(self._release(leases))
