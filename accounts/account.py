"""One scope that is bounded: what it used in each window, what it holds, its rates. Knows no request."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from accounts.rates import Bucket
from accounts.rules import Budget, Limits
from accounts.windows import WINDOWS, Starts

CONCURRENCY_RETRY_S = 1.0
"""Told where too many requests run at once: when one of them ends is not known."""


class Spent:
    """Of one scope in one window, in nano-units. A hold keeps those of the windows in which it began."""

    __slots__ = ("held", "late", "settled")

    def __init__(self) -> None:
        self.settled = 0
        self.held = 0
        self.late = 0
        """Of records that the ledger may have already."""


class Level(msgspec.Struct, frozen=True, gc=False):
    """How far one rate is used: so many are left of ``limit``, and all of them in ``reset_s``."""

    limit: int
    remaining: int
    reset_s: float


class Standing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a client is told of its rates: of each the one that has least left. None: nothing bounds it."""

    requests: Level | None = None
    prompt: Level | None = None
    output: Level | None = None

    @classmethod
    def tightest(cls, accounts: Sequence[Account], now_s: float) -> Standing:
        """Of several scopes that all hold."""
        found: dict[str, Level] = {}
        for account in accounts:
            for bucket in account.buckets:
                left = max(0, int(bucket.level(now_s)))
                level = found.get(bucket.name)
                if level is None or left < level.remaining:
                    found[bucket.name] = Level(bucket.per_minute, left, bucket.full_s(now_s))
        return cls(
            requests=found.get("requests_per_minute"),
            prompt=found.get("prompt_tokens_per_minute"),
            output=found.get("output_tokens_per_minute"),
        )


class Account:
    """One scope."""

    __slots__ = ("buckets", "limits", "name", "running", "seen_s", "spents", "starts")

    def __init__(self, name: str, limits: Limits, now_s: float) -> None:
        self.name = name
        self.limits = Limits()
        self.running = 0
        """Requests that hold something."""
        self.starts: Starts = (-1, -1, -1, -1)
        self.spents: list[Spent] = [Spent() for _ in WINDOWS]
        self.seen_s = 0.0
        """The latest wall-clock time."""
        self.buckets: tuple[Bucket, ...] = ()
        self.bound(limits, now_s)

    @property
    def title(self) -> str:
        """As people read it."""
        kind, _, which = self.name.partition(":")
        return "The cluster" if kind == "cluster" else f"{'Team' if kind == 'team' else 'API key'} {which}"

    def bound(self, limits: Limits, now_s: float) -> None:
        """Change its limits. What was used stays used."""
        former = {bucket.name: bucket for bucket in self.buckets}
        self.limits = limits
        self.buckets = tuple(
            former[name].resized(rate, now_s) if name in former else Bucket(name, rate, now_s)
            for name in ("requests_per_minute", "prompt_tokens_per_minute", "output_tokens_per_minute")
            if (rate := getattr(limits, name)) is not None
        )

    def turn(self, starts: Starts, wall_s: float) -> None:
        """The time has come to these windows: new ones begin at nothing. Open holds keep the list of the old ones."""
        if wall_s > self.seen_s:
            self.seen_s = wall_s
        if starts is not self.starts:
            self.spents = [
                spent if before == now else Spent()
                for spent, before, now in zip(self.spents, self.starts, starts, strict=True)
            ]
            self.starts = starts

    def over(self, amount: int, spents: Sequence[Spent]) -> Budget | None:
        """The budget that ``amount`` more would pass. ``spents``: of the windows that it would belong to."""
        if amount:
            for budget in self.limits.budgets:
                spent = spents[WINDOWS.index(budget.window)]
                if spent.settled + spent.held + spent.late + amount > budget.amount:
                    return budget
        return None

    def lacks(self, now_s: float, *, requests: int, prompt: int, output: int) -> tuple[str, float] | None:
        """The limit that has no room now, and for how long it has none."""
        most = self.limits.concurrent_requests
        if requests and most is not None and self.running >= most:
            return "concurrent_requests", CONCURRENCY_RETRY_S
        for bucket in self.buckets:
            cost = _cost(bucket, requests, prompt, output)
            if cost and (lacks_s := bucket.lacks_s(cost, now_s)) > 0:
                return bucket.name, lacks_s
        return None

    def take(self, now_s: float, *, requests: int = 0, prompt: int = 0, output: int = 0) -> None:
        """Use so much of its rates, or give back what is negative."""
        for bucket in self.buckets:
            cost = _cost(bucket, requests, prompt, output)
            if cost:
                bucket.take(cost, now_s)


def _cost(bucket: Bucket, requests: int, prompt: int, output: int) -> int:
    if bucket.name == "requests_per_minute":
        return requests
    return prompt if bucket.name == "prompt_tokens_per_minute" else output
