"""The one place where tests wait by asking again: for what real time or another process does and nothing announces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

POLL_S = 0.005


async def until(holds: Callable[[], object], *, within_s: float) -> None:
    """Return as soon as ``holds()``; let the loop run meanwhile. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(POLL_S)
