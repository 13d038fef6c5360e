"""How fast something is given back, per second, forgetting older releases exponentially. Pure."""

from __future__ import annotations

from runtime.fading import KNOWN_AFTER_S, PACE_MIN_PER_S, left_after


class ReleaseRate:
    """Counts since the first release, and of older ones less and less."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._released = 0.0
        self._at_s = 0.0
        self._first_s: float | None = None

    def released(self, count: float, now_s: float) -> None:
        """Count a release."""
        self._decay(now_s)
        self._released += count
        if self._first_s is None:
            self._first_s = now_s

    def per_s(self, now_s: float) -> float:
        """The present rate; 0 when nothing was released for so long that it says nothing any more."""
        self._decay(now_s)
        elapsed_s = 0.0 if self._first_s is None else now_s - self._first_s
        # Before it is known a window's worth of time is assumed to have passed, which makes the pace look low.
        seen = 1.0 - left_after(elapsed_s, self._window_s) if elapsed_s >= KNOWN_AFTER_S else 1.0
        pace = self._released / (self._window_s * seen)
        return pace if pace >= PACE_MIN_PER_S else 0.0

    def _decay(self, now_s: float) -> None:
        self._released *= left_after(now_s - self._at_s, self._window_s)
        self._at_s = max(self._at_s, now_s)
