"""The seam through which time enters. Holds no policy and never sleeps."""

from __future__ import annotations

import time
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
