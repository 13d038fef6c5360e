"""How often a request may be tried again, and all of a front proxy together. Pure: time and chance are arguments."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

# The pause before a refused retry is planned again doubles up to this multiple of the first one.
PAUSE_GROWTH_MAX = 8
# Each is drawn between these shares of that: what waits for the same worker must not come back as one.
PAUSE_SHARE_MIN, PAUSE_SHARE_MAX = 0.5, 1.5


class RetryBounds(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of one request's retries; configuration says what each is for."""

    attempts_max: int
    resumes_max: int
    replans_max: int
    replan_wait_s: float


class _Bucket:
    """Tokens that time brings, up to a number."""

    def __init__(self, *, per_s: float, burst_max: int, now_s: float) -> None:
        assert per_s >= 0.0 and burst_max >= 1, (per_s, burst_max)
        self._per_s = per_s
        self._burst_max = float(burst_max)
        self._tokens = self._burst_max
        self._at_s = now_s

    def _add(self, tokens: float) -> None:
        self._tokens = min(self._tokens + tokens, self._burst_max)

    def _pass(self, now_s: float) -> None:
        self._add(max(now_s - self._at_s, 0.0) * self._per_s)
        self._at_s = max(now_s, self._at_s)


class RetryBudget(_Bucket):
    """One bucket of tokens for a whole front proxy: a retry takes one, requests and time fill it up.

    It starts full, so that a worker's death can move all that ran there at once. What it forbids is a cluster kept
    busy by retries alone: in the long run there are at most ``ratio`` retries a request, and ``per_s`` each second.
    """

    def __init__(self, *, ratio: float, per_s: float, burst_max: int, now_s: float) -> None:
        assert ratio >= 0.0, ratio
        super().__init__(per_s=per_s, burst_max=burst_max, now_s=now_s)
        self._ratio = ratio

    @property
    def tokens(self) -> float:
        """Retries that may follow at once, as of the last call."""
        return self._tokens

    def request_came(self) -> None:
        """A request was taken on."""
        self._add(self._ratio)

    def take(self, now_s: float) -> bool:
        """Whether one more retry may run; true takes it."""
        self._pass(now_s)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class ReplanPace(_Bucket):
    """How often a whole front proxy asks the scheduler again for requests that had no place: a bucket of tokens too.

    Unlike a retry nobody is refused one. Whoever finds it empty is given the moment at which his will be there, in the
    order in which they came, so that a wait for room gets longer with the number of those who wait.
    """

    def __init__(self, *, per_s: float, burst_max: int, waiting_max: int, now_s: float) -> None:
        """``waiting_max``: how many can wait at once. So many tokens are promised at most.

        Those of requests that end before their turn are never used: without a bound a long storm would leave a debt
        behind that nobody waits for, and whoever comes after it would wait for all of that.
        """
        assert per_s > 0.0 and waiting_max >= 1, (per_s, waiting_max)
        super().__init__(per_s=per_s, burst_max=burst_max, now_s=now_s)
        self._promised_max = float(waiting_max)

    def wait_s(self, now_s: float) -> float:
        """Take one; how long until it is there."""
        self._pass(now_s)
        # Negative: so many are promised that are not there yet.
        self._tokens = max(self._tokens - 1.0, -self._promised_max)
        return max(0.0, -self._tokens / self._per_s)


class Retries:
    """The counts of one request. ``budget`` is asked last: what is refused for another reason must not cost it.

    ``pace`` says how long a front proxy's next replan has to wait. ``draw`` gives numbers in [0, 1).
    """

    __slots__ = ("_bounds", "_budget", "_draw", "_pace", "_replans", "_resumes", "_tries", "excluded")

    def __init__(
        self,
        bounds: RetryBounds,
        budget: Callable[[], bool],
        pace: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        assert bounds.attempts_max >= 1, bounds
        self.excluded: list[str] = []
        """Workers that failed since there was progress; one that is well by then may be used again."""
        self._bounds = bounds
        self._budget = budget
        self._pace = pace
        self._draw = draw
        self._tries = 1
        self._resumes = 0
        self._replans = 0

    @property
    def attempts_bound(self) -> int:
        """No request is ever planned more often than this; one more is for a sibling that cannot stay where it is."""
        bounds = self._bounds
        return bounds.attempts_max * (bounds.resumes_max + 1) + bounds.replans_max + 1

    def exclude(self, worker_id: str) -> None:
        """Do not use this worker for the next try."""
        if worker_id not in self.excluded:
            self.excluded.append(worker_id)

    def progressed(self) -> None:
        """Something new for the client, or on the way to it: the tries begin anew, as often as a stream may resume."""
        if self._tries > 1 and self._resumes < self._bounds.resumes_max:
            self._tries = 1
            self._resumes += 1
            self.excluded.clear()

    @property
    def left(self) -> bool:
        """Whether another try may follow a failed one, should the budget allow it."""
        return self._tries < self._bounds.attempts_max

    @property
    def replans_left(self) -> bool:
        """Whether a refused retry would be planned again."""
        return self._replans < self._bounds.replans_max

    def again(self) -> bool:
        """Whether another try may follow a failed one; true counts it."""
        if not self.left or not self._budget():
            return False
        self._tries += 1
        return True

    @property
    def last_of_several(self) -> bool:
        """Whether the try that was counted is the third or later one in a row, and none may follow it."""
        return self._tries >= max(self._bounds.attempts_max, 3)

    def breath_s(self) -> float:
        """A pause before the last try; ``attempts_max`` bounds how many there are, and the pace is that of replans."""
        return self._drawn_s(self._bounds.replan_wait_s)

    def pause_s(self) -> float | None:
        """How long to wait before a refused retry is planned again; None when it has waited often enough."""
        if not self.replans_left:
            return None
        wait_s = self._bounds.replan_wait_s * min(2.0**self._replans, PAUSE_GROWTH_MAX)
        self._replans += 1
        # Nobody else is left: one of the excluded may have been started again by then.
        self.excluded.clear()
        return self._drawn_s(wait_s)

    def _drawn_s(self, wait_s: float) -> float:
        drawn_s = wait_s * (PAUSE_SHARE_MIN + self._draw() * (PAUSE_SHARE_MAX - PAUSE_SHARE_MIN))
        return max(drawn_s, self._pace())
