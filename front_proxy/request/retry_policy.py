"""How often a request may be tried again, and all of a front proxy together. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Callable

UNTAKEN_MAX = 60
"""How often one request may be planned again without using up a retry. A try counts here if the
worker could not be reached. It also does if the worker was full, but only once the client has the beginning of its
stream. While the scheduler is away each try waits for ``plan_patience_s`` first, so 60 tries last about 30 s."""


class RetryBudget:
    """One bucket of tokens for a whole front proxy: a retry takes one, requests and time fill it up.

    It starts full, so that a worker's death can move all that ran there at once. It prevents a cluster
    that runs nothing but retries. In the long run there are at most ``ratio`` retries a request, and ``per_s`` each
    second.
    """

    def __init__(self, *, ratio: float, per_s: float, burst_max: int, now_s: float) -> None:
        assert ratio >= 0.0 and per_s >= 0.0 and burst_max >= 1, (ratio, per_s, burst_max)
        self._ratio = ratio
        self._per_s = per_s
        self._burst_max = float(burst_max)
        self._tokens = self._burst_max
        self._at_s = now_s

    def request_came(self) -> None:
        """A request was taken on."""
        self._add(self._ratio)

    def take(self, now_s: float) -> bool:
        """Whether one more retry may run; true takes it. ``now_s`` never goes back."""
        self._add((now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _add(self, tokens: float) -> None:
        self._tokens = min(self._tokens + tokens, self._burst_max)


class RetryPolicy:
    """The counts of one request. ``budget`` is asked last: a retry that another rule refuses must not spend it."""

    __slots__ = ("_attempts_max", "_budget", "_resumes", "_resumes_max", "_tries", "_untaken", "excluded")

    def __init__(self, attempts_max: int, resumes_max: int, budget: Callable[[], bool]) -> None:
        assert attempts_max >= 1, attempts_max
        self.excluded: list[str] = []
        """Workers that failed since the last progress. Progress empties it, so a recovered worker is used again."""
        self._attempts_max = attempts_max
        self._resumes_max = resumes_max
        self._budget = budget
        self._tries = 1
        self._resumes = 0
        self._untaken = 0

    @property
    def attempts_bound(self) -> int:
        """No request is planned more often. The last 1 is for a pinned sequence that must leave its worker."""
        return self._attempts_max * (self._resumes_max + 1) + UNTAKEN_MAX + 1

    def exclude(self, worker_id: str) -> None:
        """Do not use this worker for the next try."""
        if worker_id not in self.excluded:
            self.excluded.append(worker_id)

    def progressed(self) -> None:
        """Something new for the client, or on the way to it. Resets the tries, at most ``resumes_max`` times."""
        if not self.excluded:
            return
        if self._tries > 1:
            if self._resumes == self._resumes_max:
                return
            self._resumes += 1
            self._tries = 1
        self.excluded.clear()

    def again(self) -> bool:
        """Whether another try may follow a failed one; true counts it."""
        if self._tries >= self._attempts_max or not self._budget():
            return False
        self._tries += 1
        return True

    def again_untaken(self) -> bool:
        """Whether another try may follow one that no worker took, without being counted as a try."""
        if self._untaken >= UNTAKEN_MAX:
            return False
        self._untaken += 1
        return True
