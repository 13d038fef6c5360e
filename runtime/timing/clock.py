"""The seam through which time enters. Holds no policy and never sleeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """A clock that never goes back. The simulation has its own."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary point; only differences mean anything."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic_s(self) -> float:
        """Seconds from the operating system's monotonic clock."""
        return time.monotonic()


# uvloop counts whole milliseconds and only once a turn; further apart than this, a loop keeps a time of its own.
_SAME_CLOCK_S = 1.0


def precise_clock(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """``loop.time`` with the machine's full resolution; a loop in virtual time keeps its own."""
    if abs(loop.time() - time.monotonic()) < _SAME_CLOCK_S:
        return time.monotonic
    return loop.time
