"""Looks over the shoulder of a leader's treasury: no budget is passed, at every event. Decides nothing itself.

Two exceptions are stated in docs/accounts.md, and are counted here by scope: what front proxies grant while no
scheduler answers, and what a front proxy tells a new leader only after that waited for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accounts.config import AccountsLimits
from accounts.rules import Rules
from accounts.treasury import Treasury
from accounts.usage import UsageRecord
from accounts.windows import WINDOWS
from front_proxy.dispatch.accounts_link import AccountsLink
from front_proxy.request.bill import Part
from simulation.faults.invariants import Invariant, hold
from simulation.kernel.world import World

Excused = dict[str, int]
"""By scope: what may be above its budgets, in nano-units."""


def _excuse(excused: Excused, team: str, key_id: str, amount: int) -> None:
    for scope in ("cluster", f"team:{team}", f"key:{key_id}"):
        excused[scope] = excused.get(scope, 0) + amount


def excuse_grants(link: AccountsLink, rules: Rules, excused: Excused) -> None:
    """What this front proxy grants itself is excused."""
    grant_away = link.grant_away

    def watched(part: Part) -> bool:
        before = part.granted
        granted = grant_away(part)
        if granted:
            bill = part.bill
            prompt = 0 if before else part.prompt_tokens
            amount = rules.price(bill.model).amount(prompt, 0, part.granted - before, bill.priority_class)
            _excuse(excused, bill.team, bill.key_id, amount)
        return granted

    link.grant_away = watched  # type: ignore[method-assign]


class WatchedTreasury:
    """Of one start of a scheduler."""

    def __init__(
        self, treasury: Treasury, world: World, limits: AccountsLimits, excused: Excused, *, enforces: bool
    ) -> None:
        self._treasury = treasury
        self._world = world
        self._limits = limits
        self._excused = excused
        self._enforces = enforces
        # Front proxies that this leader has to hear, and until when it waits for them.
        self._awaited: set[str] = set()
        self._awaited_until_s = 0.0
        for name in ("hold", "extend", "settle", "booked", "told", "due", "expect"):
            setattr(treasury, name, world.watched(self._after(name, getattr(treasury, name))))

    def _after(self, name: str, call: Any) -> Any:
        def watched(*given: Any) -> Any:
            before = {id(hold): hold.amount for hold in self._treasury._holds.values()}
            late = name == "settle" and not self._treasury.holds_of(given[0].uid)
            answer = call(*given)
            if name == "expect":
                self._expect(*given)
            elif late and self._too_late(self._awaited):
                record: UsageRecord = answer[0]
                _excuse(self._excused, record.team, record.key_id, record.amount)
            elif name == "told":
                self._told(given[0], before)
            self._check()
            return answer

        return watched

    def _expect(self, fronts: Iterable[str], now_s: float) -> None:
        self._awaited = set(fronts)
        self._awaited_until_s = now_s + self._limits.rebuild_grace_s

    def _too_late(self, fronts: set[str]) -> bool:
        return bool(fronts) and self._world.now_s >= self._awaited_until_s

    def _told(self, front: str, before: dict[int, int]) -> None:
        if self._too_late(self._awaited & {front}):
            for each in self._treasury._holds.values():
                _excuse(self._excused, each.ask.team, each.ask.key_id, each.amount - before.get(id(each), 0))
        self._awaited.discard(front)

    def _check(self) -> None:
        self._treasury.check()
        if not self._enforces:
            return
        windows = {(account.name, id(account.spents)): (account, account.spents) for account in self._accounts()}
        for each in self._treasury._holds.values():
            for account, spents in zip(each.accounts, each.spents, strict=True):
                windows[account.name, id(spents)] = account, spents
        for account, spents in windows.values():
            for budget in account.limits.budgets:
                spent = spents[WINDOWS.index(budget.window)]
                most = budget.amount + self._excused.get(account.name, 0)
                seen = (account.name, spent.settled, spent.held, budget, most)
                hold(Invariant.BUDGETS, spent.settled + spent.held <= most, "a budget is passed", seen)

    def _accounts(self) -> Iterable[Any]:
        return self._treasury._accounts.values()
