"""How fast a line moves: tokens granted per second of having somebody wait. Forgets exponentially."""

from __future__ import annotations

from runtime.fading import KNOWN_AFTER_S, PACE_MIN_PER_S, left_after


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
            kept = left_after(elapsed_s, self._window_s)
            self._tokens *= kept
            self._busy_s = self._busy_s * kept + elapsed_s
        self._at_s, self._busy = now_s, waiting

    def drained(self, tokens: int) -> None:
        """Somebody who waited was served."""
        self._tokens += tokens

    @property
    def tokens_per_s(self) -> float | None:
        """The present pace; None while nothing is known, and when nobody was served for as long as to forget it."""
        if self._busy_s < KNOWN_AFTER_S:
            return None
        pace = self._tokens / self._busy_s
        return pace if pace >= PACE_MIN_PER_S else None
