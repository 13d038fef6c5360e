"""Whether the scheduler at the other end may be believed: it leads, and it speaks. Pure; decides no request."""

from __future__ import annotations

from runtime.newest_leader import NewestLeader
from runtime.silence import Silence, look_interval_s

NEVER_S = float("inf")


class LeaderWatch:
    """Over all streams to schedulers, one after the other. ``several``: there is another one to go to."""

    def __init__(self, *, silence_timeout_s: float, several: bool) -> None:
        self.look_s = NEVER_S
        """When to ``look`` next."""
        self._silence_timeout_s = silence_timeout_s
        self._several = several
        self._newest = NewestLeader()
        self._silence = Silence()
        self._promised_s = 0.0

    def end(self) -> None:
        """The stream is over: nobody is watched until the next one promises to speak."""
        self.look_s, self._promised_s = NEVER_S, 0.0

    def believes(self, leader_epoch: int) -> bool:
        """Whether a message comes from the newest leader seen. An older one stood still and does not know it yet."""
        self._silence.heard()
        return self._newest.believes(leader_epoch)

    def promised(self, sign_of_life_s: float, now_s: float) -> None:
        """It says that it will speak so often; 0: it promises nothing."""
        self._promised_s = sign_of_life_s
        if sign_of_life_s and self._several and self.look_s == NEVER_S:
            self._look_later(now_s)

    def look(self, now_s: float) -> bool:
        """Whether it was silent for too long. Asked at ``look_s`` or later."""
        self._look_later(now_s)
        return self._silence.look()

    def _look_later(self, now_s: float) -> None:
        # From now on, not from when it was due: who stood still himself looks late, and not often.
        self.look_s = now_s + look_interval_s(self._silence_timeout_s, self._promised_s)
