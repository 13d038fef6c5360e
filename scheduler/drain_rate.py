"""How fast a line moves: tokens granted per second of having somebody wait. Forgets exponentially."""

from __future__ import annotations

import math

# Less waiting than this says nothing about the pace.
KNOWN_AFTER_S = 0.5


class DrainRate:
    """Time in which nobody waits does not count: an idle cluster is not a slow one."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._tokens = 0.0
        self._busy_s = 0.0
        self._at_s = 0.0
        self._busy = False

    def busy(self, *, waiting: bool, now_s: float) -> None:
        """Say whether somebody waits from now on."""
        if self._busy:
            elapsed_s = max(0.0, now_s - self._at_s)
            kept = math.exp(-elapsed_s / self._window_s)
            self._tokens *= kept
            self._busy_s = self._busy_s * kept + elapsed_s
        self._at_s, self._busy = now_s, waiting

    def drained(self, tokens: int) -> None:
        """Somebody who waited was served."""
        self._tokens += tokens

    @property
    def tokens_per_s(self) -> float | None:
        """The present pace; None while nothing is known."""
        return self._tokens / self._busy_s if self._busy_s >= KNOWN_AFTER_S and self._tokens > 0 else None
