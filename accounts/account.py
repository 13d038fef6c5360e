"""Scopes that are bounded: what each used in its windows, what it holds, its rates. Knows no request."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from accounts.rates import BUCKETS, Bucket, Use
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
        """Kept where the scope has a budget of this window. Elsewhere no one asks, and it may be anything."""
        self.late = 0
        """Of records that the ledger may have already."""


class Level(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far one rate is used: so many are left of ``limit``, and all of them in ``reset_s``."""

    limit: int
    remaining: int
    reset_s: float


class Standing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a client is told of its rates: of each the one that has least left. None: nothing bounds it."""

    requests: Level | None = None
    prompt: Level | None = None
    output: Level | None = None


class Account:
    """One scope."""

    __slots__ = ("buckets", "limits", "name", "running", "spents", "starts")

    def __init__(self, name: str, limits: Limits, now_s: float) -> None:
        self.name = name
        self.limits = Limits()
        self.running = 0
        """Requests that hold something."""
        self.starts: Starts = (-1, -1, -1, -1)
        self.spents: list[Spent] = [Spent() for _ in WINDOWS]
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
            for name in BUCKETS
            if (rate := getattr(limits, name)) is not None
        )

    def turn(self, starts: Starts) -> None:
        """The time has come to these windows: new ones begin at nothing. Open holds keep those of the old ones."""
        if starts is not self.starts:
            self.spents = [
                spent if before == now else Spent()
                for spent, before, now in zip(self.spents, self.starts, starts, strict=True)
            ]
            self.starts = starts

    def lacks(self, use: Use, now_s: float) -> tuple[str, float] | None:
        """The limit that has no room now, and for how long it has none."""
        most = self.limits.concurrent_requests
        if most is not None and use[0] and self.running >= most:
            return "concurrent_requests", CONCURRENCY_RETRY_S
        for bucket in self.buckets:
            cost = use[bucket.which]
            if cost and (lacks_s := bucket.lacks_s(cost, now_s)) > 0:
                return bucket.name, lacks_s
        return None


class Bounds:
    """All that bounds the requests of one key, in the windows of one day."""

    __slots__ = ("accounts", "budgeted", "budgets", "limited", "rated", "spents", "starts")

    def __init__(self, accounts: Sequence[Account], starts: Starts) -> None:
        for account in accounts:
            account.turn(starts)
        self.accounts = accounts
        self.starts = starts
        self.spents = tuple(spent for account in accounts for spent in account.spents)
        """Of every account, in every window."""
        self.read()

    def read(self) -> None:
        """Take the limits of the accounts as they are now."""
        self.budgets = tuple(
            (self.spents[index * len(WINDOWS) + WINDOWS.index(budget.window)], budget.amount, account, budget)
            for index, account in enumerate(self.accounts)
            for budget in account.limits.budgets
        )
        self.budgeted = tuple({id(spent): spent for spent, *_ in self.budgets}.values())
        """Where what is held is kept."""
        self.rated = tuple(bucket for account in self.accounts for bucket in account.buckets)
        self.limited = tuple(
            each for each in self.accounts if each.buckets or each.limits.concurrent_requests is not None
        )

    def over(self, amount: int) -> tuple[Account, Budget] | None:
        """The first budget that ``amount`` more would pass, and whose it is."""
        if amount:
            for spent, most, account, budget in self.budgets:
                if spent.settled + spent.held + spent.late + amount > most:
                    return account, budget
        return None

    def take(self, use: Use, now_s: float) -> None:
        """Use so much of the rates."""
        for bucket in self.rated:
            if cost := use[bucket.which]:
                bucket.take(cost, now_s)

    def standing(self, now_s: float) -> Standing | None:
        """How far the rates are used; None: there are none."""
        if not self.rated:
            return None
        tightest: list[Level | None] = [None, None, None]
        for bucket in self.rated:
            level, most = bucket.level(now_s), bucket.per_minute
            left, known = max(0, int(level)), tightest[bucket.which]
            if known is None or left < known.remaining:
                tightest[bucket.which] = Level(most, left, (most - level) * 60 / most)
        return Standing(*tightest)
