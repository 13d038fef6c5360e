"""Holds: what a request may use is set aside before it runs, in every scope that bounds it, or in none. Pure.

``held -> extended* -> settled``. A hold is known by its request's uid, so attempts, siblings and resumed streams share
it. It covers the prompt and a slice of output, grows while the stream runs, and is replaced by the usage record, once.
It belongs to the windows in which it began. ``check`` asserts that nothing is counted twice.

A record without a hold was served while the scheduler was away, or is told again. It counts as ``late`` until the
ledger says how much of it is new. What of any record the ledger does not take, because it has one, does not stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from accounts.account import Account, Bounds, Spent, Standing
from accounts.config import LIMITS, AccountsLimits
from accounts.key_table import Key
from accounts.rates import Use
from accounts.rules import FREE, Limits, Price, Rules
from accounts.usage import Tokens, UsageRecord
from accounts.windows import WINDOWS, Calendar

Reason = Literal["rate", "concurrency", "budget", "rebuilding", "ledger", "key"]


class HoldAsked(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """One part of a request: one prompt with one output. Siblings of n > 1 are parts without a prompt."""

    uid: bytes
    """Of the request: 16 bytes by chance."""
    part: Tokens
    """Which prompt and output of it, from 0."""
    key_id: str
    """Empty where keys are not required."""
    team: str
    """The key's, or the tenant that the request names."""
    model: str
    """That serves."""
    priority_class: str
    prompt_tokens: Tokens
    """To be paid for: 0 for further outputs of a prompt."""
    output_tokens_max: Tokens
    """Of all attempts together."""


class Held(msgspec.Struct, frozen=True, gc=False):
    """The part may run, and show so many tokens until more are granted."""

    granted_tokens: int
    standing: Standing | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing was set aside. ``may_wait``: the class of the request waits rather than being refused."""

    reason: Reason
    message: str
    retry_after_s: float | None = None
    may_wait: bool = False
    standing: Standing | None = None


class PartTold(msgspec.Struct, frozen=True, array_like=True):
    """One part of a request that runs, as its front proxy tells it to a new leader."""

    ask: HoldAsked
    granted_tokens: Tokens
    """Or taken while no scheduler answered. 0: it waits for its answer."""


class _Hold(msgspec.Struct, eq=False):
    """One request's."""

    ask: HoldAsked
    front: str
    price: Price
    bounds: Bounds
    """In the windows in which this began."""
    began_s: float
    amount: int = 0
    prompt: int = 0
    output: int = 0
    estimate: int = 0
    """What was settled of it when its front proxy seemed to be dead."""
    parts: dict[int, tuple[int, int]] = {}
    """Granted and most tokens of each."""

    def more(self, prompt: int, output: int) -> int:
        """What so many tokens more would add, in nano-units."""
        whole = self.price.amount(self.prompt + prompt, 0, self.output + output, self.ask.priority_class)
        return whole - self.amount

    def grow(self, part: int, granted: int, most: int, amount: int, prompt: int, output: int) -> None:
        """Add to it what ``more`` said; the part has ``granted`` tokens now."""
        self.amount += amount
        self.prompt += prompt
        self.output += output
        self.parts[part] = granted, most
        for spent in self.bounds.budgeted:
            spent.held += amount


class Treasury:
    """All scopes: the cluster, each team, each key. Amounts are nano-units; times are arguments that do not go back."""

    def __init__(
        self,
        rules: Rules,
        keys: Mapping[str, Key],
        *,
        slice_tokens: int,
        enforce: bool,
        limits: AccountsLimits = LIMITS,
    ) -> None:
        self.rules = rules
        self.ledger_away = False
        """The ledger takes no records: where limits are enforced, nothing that has a price begins."""
        self.keys = keys
        self._slice_tokens = slice_tokens
        self._enforce = enforce
        self._limits = limits
        self._calendar = Calendar(rules.timezone)
        self._accounts: dict[str, Account] = {}
        # What bounds a request today, by its team and key.
        self._bounds: dict[tuple[str, str], Bounds] = {}
        # The latest wall-clock time.
        self._seen_s = 0.0
        self._holds: dict[bytes, _Hold] = {}
        # Front proxies that went away, with the time at which their holds are settled as they are.
        self._gone: dict[str, float] = {}
        # Front proxies that were there before this leader, and have not told what they run.
        self._awaited: set[str] = set()
        self._awaited_until_s = float("-inf")
        # Of each record that the ledger has not booked, in their order: what was settled of it, and what is late.
        self._unbooked: dict[bytes, list[tuple[int, int, Sequence[Spent]]]] = {}
        # Settled as held, until the truth comes.
        self._estimated: dict[bytes, _Hold] = {}

    # What is asked

    def hold(self, ask: HoldAsked, front: str, now_s: float, wall_s: float) -> Refused | None:
        """Set aside what the part may use first. None: it is. Idempotent for each uid and part."""
        known = self._holds.get(ask.uid)
        if known is not None and ask.part in known.parts:
            known.front = front
            return None
        hold = known or self._new(ask, front, now_s, wall_s)
        prompt, first = ask.prompt_tokens, min(ask.output_tokens_max, self._slice_tokens)
        amount = hold.more(prompt, first)
        use = 1 if known is None else 0, prompt, first
        if self._enforce and (refused := self._objection(hold, ask, amount, use, now_s)) is not None:
            return refused
        if known is None:
            self._open(hold)
        hold.grow(ask.part, first, ask.output_tokens_max, amount, prompt, first)
        hold.bounds.take(use, now_s)
        return None

    def granted(self, ask: HoldAsked, now_s: float) -> Held | None:
        """What a part holds now, and how far the rates that bound it are used; None: nothing."""
        hold = self._holds.get(ask.uid)
        if hold is None or (part := hold.parts.get(ask.part)) is None:
            return None
        return Held(part[0], hold.bounds.standing(now_s) if self._enforce else None)

    def extend(self, uid: bytes, part: int, beyond_tokens: int, now_s: float) -> int | None:
        """The tokens that a part may show now; not more than ``beyond_tokens``: it is refused. Idempotent.

        Only a budget refuses: what a rate lacks is owed. None: no hold of this request is known here.
        """
        hold = self._holds.get(uid)
        at = None if hold is None else hold.parts.get(part)
        if hold is None or at is None:
            return None
        granted, most = at
        # Also what its front proxy granted itself while no scheduler answered.
        more = min(max(granted, beyond_tokens) + self._slice_tokens, most) - granted
        if granted > beyond_tokens or more <= 0:
            return granted
        amount = hold.more(0, more)
        if self._enforce and hold.bounds.over(amount) is not None:
            return granted
        hold.grow(part, granted + more, most, amount, 0, more)
        hold.bounds.take((0, 0, more), now_s)
        return granted + more

    def settle(self, record: UsageRecord, now_s: float, wall_s: float) -> tuple[UsageRecord, bool]:
        """The record with its amount; and whether its hold ended with it. ``booked`` must follow."""
        hold = self._holds.pop(record.uid, None)
        price = hold.price if hold is not None else self.rules.price(record.model)
        uncached = record.prompt_tokens - record.cached_tokens
        amount = price.amount(uncached, record.cached_tokens, record.output_tokens, record.priority_class)
        window_s = wall_s if hold is None else hold.began_s
        record.amount, record.rules_version, record.window_s = amount, self.rules.version, window_s
        if hold is None:
            unbooked = self._unbooked.setdefault(record.uid, [])
            estimated = self._estimated.pop(record.uid, None)
            bounds = self._of(record.team, record.key_id, now_s, wall_s) if estimated is None else estimated.bounds
            # An estimate, and what waits for the ledger already, covers it.
            late = 0 if unbooked or estimated is not None else amount
            unbooked.append((0, late, bounds.spents))
            for spent in bounds.spents:
                spent.late += late
            return record, False
        bounds, held = hold.bounds, hold.amount
        self._unbooked.setdefault(record.uid, []).append((amount - hold.estimate, 0, bounds.spents))
        for spent in bounds.budgeted:
            spent.held -= held
        for spent in bounds.spents:
            spent.settled += amount
        for account in bounds.accounts:
            account.running -= 1
        bounds.take((0, uncached - hold.prompt, record.output_tokens - hold.output), now_s)
        return record, True

    def set_aside(self, uid: bytes, now_s: float, wall_s: float) -> UsageRecord | None:
        """The record of this request cannot be read: it is settled as it was held. None: it holds nothing."""
        hold = self._holds.get(uid)
        return None if hold is None else self._as_held(hold, now_s, wall_s)

    def booked(self, uid: bytes, amount: int) -> None:
        """The ledger has the oldest record of this uid that waited; ``amount`` of it is new: 0 where it had it."""
        unbooked = self._unbooked[uid]
        settled, late, spents = unbooked.pop(0)
        if not unbooked:
            del self._unbooked[uid]
        if late or amount != settled:
            for spent in spents:
                spent.late -= late
                spent.settled += amount - settled

    # Who is there

    def expect(self, fronts: Iterable[str], now_s: float) -> None:
        """These front proxies were there before this leader: what they run is not known yet."""
        self._awaited = set(fronts)
        self._awaited_until_s = now_s + self._limits.rebuild_grace_s

    def told(self, front: str, parts: Iterable[PartTold], now_s: float, wall_s: float) -> Sequence[UsageRecord]:
        """A front proxy says all that runs on it; its records came before. Its other holds are settled as held."""
        self._awaited.discard(front)
        self._gone.pop(front, None)
        running: set[bytes] = set()
        for each in parts:
            running.add(each.ask.uid)
            if each.granted_tokens:
                self._restore(each, front, now_s, wall_s)
        lost = [hold for hold in self._holds.values() if hold.front == front and hold.ask.uid not in running]
        return [self._as_held(hold, now_s, wall_s) for hold in lost]

    def left(self, front: str, now_s: float) -> None:
        """A front proxy's stream ended. It may come back, or die with what it knew."""
        self._gone.setdefault(front, now_s + self._limits.unknown_after_s)

    def due(self, now_s: float, wall_s: float) -> Sequence[UsageRecord]:
        """Estimated records of front proxies that did not come back."""
        over = {front for front, until_s in self._gone.items() if until_s <= now_s}
        for front in over:
            del self._gone[front]
        lost = [hold for hold in self._holds.values() if hold.front in over] if over else []
        return [self._as_held(hold, now_s, wall_s) for hold in lost]

    def _restore(self, told: PartTold, front: str, now_s: float, wall_s: float) -> None:
        """A part that runs holds what it was granted, whatever is left."""
        ask, hold = told.ask, self._holds.get(told.ask.uid)
        if hold is None:
            hold = self._revived(ask.uid) or self._new(ask, front, now_s, wall_s)
            self._open(hold)
        hold.front = front
        granted, _ = hold.parts.get(ask.part, (0, 0))
        if told.granted_tokens > granted:
            prompt = 0 if ask.part in hold.parts else ask.prompt_tokens
            more = told.granted_tokens - granted
            amount = hold.more(prompt, more)
            hold.grow(ask.part, told.granted_tokens, ask.output_tokens_max, amount, prompt, more)

    def _revived(self, uid: bytes) -> _Hold | None:
        """A hold that was settled as it was, of a front proxy that lives after all."""
        hold = self._estimated.pop(uid, None)
        if hold is not None:
            # The ledger keeps the first one.
            hold.estimate = hold.estimate or hold.amount
            for spent in hold.bounds.spents:
                spent.settled -= hold.estimate
            for spent in hold.bounds.budgeted:
                spent.held += hold.amount
        return hold

    def _new(self, ask: HoldAsked, front: str, now_s: float, wall_s: float) -> _Hold:
        bounds = self._of(ask.team, ask.key_id, now_s, wall_s)
        return _Hold(ask, front, self.rules.prices.get(ask.model, FREE), bounds, wall_s)

    def _open(self, hold: _Hold) -> None:
        self._holds[hold.ask.uid] = hold
        for account in hold.bounds.accounts:
            account.running += 1

    def _as_held(self, hold: _Hold, now_s: float, wall_s: float) -> UsageRecord:
        ask = hold.ask
        record = UsageRecord(
            uid=ask.uid,
            key_id=ask.key_id,
            team=ask.team,
            model=ask.model,
            api="",
            priority_class=ask.priority_class,
            outcome="unknown",
            prompt_tokens=hold.prompt,
            output_tokens=hold.output,
            estimated=True,
            began_s=hold.began_s,
            ended_s=wall_s,
        )
        self._estimated[ask.uid] = hold
        if len(self._estimated) > self._limits.records_max:
            del self._estimated[next(iter(self._estimated))]
        return self.settle(record, now_s, wall_s)[0]

    # What holds it together

    def configure(self, rules: Rules, keys: Mapping[str, Key], now_s: float) -> None:
        """Other rules or keys: limits change at once; what is used and held stays."""
        if rules.timezone != self.rules.timezone:
            self._calendar = Calendar(rules.timezone)
        self.rules, self.keys = rules, keys
        for name, account in self._accounts.items():
            account.bound(self._limits_of(name), now_s)
        held = {hold.bounds for holds in (self._holds, self._estimated) for hold in holds.values()}
        for bounds in held.union(self._bounds.values()):
            bounds.read()
            for spent in bounds.budgeted:
                spent.held = 0
        for hold in self._holds.values():
            for spent in hold.bounds.budgeted:
                spent.held += hold.amount

    def load(self, totals: Mapping[tuple[str, str, int], int], now_s: float, wall_s: float) -> None:
        """What the ledger has of the present windows: by scope, window and the window's start."""
        for (scope, window, start_s), amount in totals.items():
            account = self.account(scope, now_s, wall_s)
            at = WINDOWS.index(window)
            if account.starts[at] == start_s:
                account.spents[at].settled = amount

    def account(self, scope: str, now_s: float, wall_s: float) -> Account:
        """What is used and left of one scope: ``cluster``, ``team:NAME`` or ``key:ID``."""
        account = self._accounts.get(scope)
        if account is None:
            account = self._accounts[scope] = Account(scope, self._limits_of(scope), now_s)
        account.turn(self._calendar.starts(wall_s))
        return account

    @property
    def holds(self) -> int:
        """Requests that hold something."""
        return len(self._holds)

    @property
    def held(self) -> int:
        """What they hold, in nano-units."""
        return sum(hold.amount for hold in self._holds.values())

    def holds_of(self, uid: bytes) -> bool:
        """Whether a request holds something."""
        return uid in self._holds

    def check(self) -> None:
        """Assert that what is held is the sum of the holds. Slow: for tests."""
        held: dict[int, int] = {}
        late: dict[int, int] = {}
        running: dict[int, int] = {}
        # Few bounds have many holds, and each has a dozen sums.
        of_bounds: dict[Bounds, tuple[int, int]] = {}
        for hold in self._holds.values():
            assert hold.more(0, 0) == 0, hold.ask
            assert hold.output == sum(granted for granted, _ in hold.parts.values()), hold.ask
            count, amount = of_bounds.get(hold.bounds, (0, 0))
            of_bounds[hold.bounds] = count + 1, amount + hold.amount
        for bounds, (count, amount) in of_bounds.items():
            for account in bounds.accounts:
                running[id(account)] = running.get(id(account), 0) + count
            for spent in bounds.budgeted:
                held[id(spent)] = held.get(id(spent), 0) + amount
        for unbooked in self._unbooked.values():
            for _, amount, spents in unbooked:
                for spent in spents if amount else ():
                    late[id(spent)] = late.get(id(spent), 0) + amount
        for name, account in self._accounts.items():
            assert account.running == running.get(id(account), 0), name
            for budget in account.limits.budgets:
                spent = account.spents[WINDOWS.index(budget.window)]
                assert spent.held == held.get(id(spent), 0), name
            for spent in account.spents:
                assert spent.late == late.get(id(spent), 0), name

    def _objection(self, hold: _Hold, ask: HoldAsked, amount: int, use: Use, now_s: float) -> Refused | None:
        """Why a part may not have ``amount`` more, and use so much of the rates."""
        key, bounds = self.keys.get(ask.key_id), hold.bounds
        if key is None or key.revoked:
            return Refused(reason="key", message=f"API key {ask.key_id} was revoked.")
        if amount and self.ledger_away:
            return Refused(reason="ledger", message="Usage cannot be recorded at present.", retry_after_s=1.0)
        if self._awaited and now_s < self._awaited_until_s and bounds.budgets:
            text = "The scheduler has just taken over and learns what is in use."
            left_s = self._awaited_until_s - now_s
            return Refused(reason="rebuilding", message=text, retry_after_s=left_s, may_wait=True)
        if (over := bounds.over(amount)) is not None:
            account, budget = over
            left_s = self._calendar.ends(budget.window, bounds.starts[WINDOWS.index(budget.window)]) - self._seen_s
            return Refused(
                reason="budget",
                message=f"{account.title} has used its budget of {self.rules.shown(budget.amount)} ({budget.window}).",
                retry_after_s=left_s if 0 < left_s < float("inf") else None,
                standing=bounds.standing(now_s),
            )
        for account in bounds.limited:
            if (short := account.lacks(use, now_s)) is not None:
                name, lacks_s = short
                return Refused(
                    reason="concurrency" if name == "concurrent_requests" else "rate",
                    message=f"{account.title} has reached its {name}, {getattr(account.limits, name)}.",
                    retry_after_s=lacks_s,
                    may_wait=ask.priority_class in self._waits(ask.team),
                    standing=bounds.standing(now_s),
                )
        return None

    def _waits(self, team: str) -> Iterable[str]:
        found = self.rules.teams.get(team)
        return found.waits if found is not None else ("batch",)

    def _of(self, team: str, key_id: str, now_s: float, wall_s: float) -> Bounds:
        if wall_s > self._seen_s:
            self._seen_s = wall_s
        bounds, starts = self._bounds.get((team, key_id)), self._calendar.starts(wall_s)
        if bounds is None or bounds.starts is not starts:
            names = ("cluster", f"team:{team}", f"key:{key_id}") if key_id else ("cluster", f"team:{team}")
            bounds = Bounds([self.account(name, now_s, wall_s) for name in names], starts)
            self._bounds[team, key_id] = bounds
        return bounds

    def _limits_of(self, name: str) -> Limits:
        limits = self._told_limits(name)
        # Rates are of use where something is refused.
        return limits if self._enforce else Limits(budgets=limits.budgets)

    def _told_limits(self, name: str) -> Limits:
        kind, _, which = name.partition(":")
        if kind == "cluster":
            return self.rules.cluster
        if kind == "team":
            team = self.rules.teams.get(which)
            return team.limits if team is not None else Limits()
        key = self.keys.get(which)
        return key.limits if key is not None else Limits()
