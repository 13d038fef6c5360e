"""Keys and accounts of a simulated cluster: production's own, over a ledger whose disk answers at once.

Keys are given to the accounts as they are: that they reach front proxies, and are lost there, is not simulated.

A leader's treasury is watched. docs/accounts.md states two exceptions, which are counted here by scope: what front
proxies grant while no scheduler answers, and what a new leader is told only after it waited for it.
"""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from accounts.config import AccountsConfig, AccountsLimits, AuthConfig
from accounts.key_table import Key
from accounts.rules import NANO, RATES, Rules, limits_of, read
from accounts.treasury import Treasury
from accounts.usage import UsageRecord
from accounts.windows import WINDOWS
from front_proxy.dispatch.accounts_link import AccountsLink
from front_proxy.request.bill import Part
from runtime.priority_class import PriorityClass
from scheduler.accounting.accounting import Accounting
from scheduler.accounting.books import Books
from scheduler.accounting.ledger import Ledger
from scheduler.shell import SchedulerShell
from simulation.faults.fault_kinds import Faults
from simulation.faults.invariants import Invariant, hold
from simulation.faults.workload import Asked
from simulation.kernel.world import World

if TYPE_CHECKING:
    from simulation.faults.cluster import SimCluster

T = TypeVar("T")
MODEL = "m"
# Small slices, so that outputs are extended often.
SLICE_TOKENS = 8
# What eight requests of a run cost, by and large, in tokens of each kind.
_USUAL_TOKENS = 150
# How long a scheduler may take to settle what is due.
TOLD_S_MAX = 0.5
# A run is shorter than production's.
COMMIT_INTERVAL_S = 0.25
_DAY_S = 86_400.0
_MODES: tuple[Literal["off", "count", "enforce"], ...] = ("off", "count", "count", "enforce", "enforce", "enforce")
_KEYS = {each.key_id: each for each in (Key(key_id="k0", digest=b"", team="t"), Key(key_id="k1", digest=b"", team="u"))}


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What of one run is counted, and what bounds it."""

    config: AccountsConfig = AccountsConfig(mode="count", slice_tokens=SLICE_TOKENS)
    rules: str = ""
    """TOML."""
    keys: Mapping[str, Key] = msgspec.field(default_factory=_KEYS.copy)
    limits: AccountsLimits = AccountsLimits(commit_interval_s=COMMIT_INTERVAL_S)
    midnight_s: float = _DAY_S
    """When the next day begins."""
    bounds: bool = False
    """Requests may be refused."""


COUNTED = Terms()


def draw(rng: random.Random, faults: Faults) -> Terms:
    """One run's. Where no client may notice a failure, budgets are there and are not reached."""
    mode = rng.choice(_MODES)
    prompt, output = rng.randint(0, 5), rng.randint(1, 9)
    usual = _USUAL_TOKENS * (prompt + output)
    waits = 'on_empty = {default = "wait"}' if rng.random() < 0.3 else ""
    bounds = not faults.single and rng.random() < 0.6

    def limits() -> str:
        amount = int(usual * rng.uniform(0.05, 1.0)) if bounds else usual * 1_000
        lines = [f'budgets = ["{amount / NANO:.9f}/{rng.choice(("total", "day"))}"]'] if rng.random() < 0.6 else []
        rates = zip(RATES, ((2, 8), (20, 200), (20, 200), (1, 4)), strict=True)
        lines += [f"{name} = {rng.randint(*most)}" for name, most in rates if bounds and rng.random() < 0.15]
        return "\n".join(lines)

    lines = [
        f"[prices.{MODEL}]\ncached_per_million = 0\nbatch_factor = {rng.choice((1, 0.5))}",
        f"prompt_per_million = {prompt / 1000}\noutput_per_million = {output / 1000}",
        f"[cluster]\n{limits()}",
        *(f"[teams.{team}]\n{limits()}\n{waits}" for team in ("t", "u")),
    ]
    budgets = [re.findall(r'"(.+?)"', limits()) for _ in _KEYS]
    restarts = faults.scheduler_restarts or faults.schedulers > 1 or faults.single
    return Terms(
        config=AccountsConfig(
            mode=mode,
            slice_tokens=rng.choice((1, SLICE_TOKENS, SLICE_TOKENS)),
            when_away="serve" if faults.single else rng.choice(("serve", "refuse")),
        ),
        rules="\n".join(lines),
        keys={
            key.key_id: msgspec.structs.replace(key, limits=limits_of(of_key, ()))
            for key, of_key in zip(_KEYS.values(), budgets, strict=True)
        },
        limits=AccountsLimits(
            commit_interval_s=COMMIT_INTERVAL_S,
            rebuild_grace_s=0.6 if faults.single else rng.choice((0.3, 5.0)),
            unknown_after_s=rng.choice((0.5, 30.0)),
        ),
        # What runs is held in the windows of a takeover: then a day that ends proves nothing.
        midnight_s=_DAY_S if restarts or rng.random() < 0.5 else rng.uniform(0.5, 2.0),
        bounds=bounds,
    )


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What comes of something that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    raise AssertionError("it waits")


class SimLedger(Ledger):
    """To wait for a disk took three quarters of a run."""

    durable = False


class SimBooks(Books):
    """Books without a thread."""

    ledger = SimLedger

    def _run(self, what: Callable[[], T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(what())
        except Exception as error:  # noqa: BLE001 - it is raised where it is awaited
            future.set_exception(error)
        return future


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
    """Looks over its shoulder at every event: no budget is passed. Of one start of a scheduler; decides nothing."""

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
        bounded = [
            (account.spents[WINDOWS.index(budget.window)], account, budget)
            for account in self._accounts()
            for budget in account.limits.budgets
        ]
        for bounds in {each.bounds for each in self._treasury._holds.values()}:
            bounded += [(spent, account, budget) for spent, _, account, budget in bounds.budgets]
        for spent, account, budget in bounded:
            most = budget.amount + self._excused.get(account.name, 0)
            seen = (account.name, spent.settled, spent.held, budget, most)
            hold(Invariant.BUDGETS, spent.settled + spent.held <= most, "a budget is passed", seen)

    def _accounts(self) -> Iterable[Any]:
        return self._treasury._accounts.values()


class SimAccounts:
    """The one ledger of a run, which all schedulers open in turn."""

    def __init__(self, world: World, terms: Terms) -> None:
        self._world = world
        self._terms = terms
        self._excused: Excused = {}
        self._folder = tempfile.TemporaryDirectory(prefix="baton-sim-")
        self._path = Path(self._folder.name) / "ledger.sqlite"
        rules_file = Path(self._folder.name) / "rules.toml"
        rules_file.write_text(terms.rules)
        self._config = msgspec.structs.replace(terms.config, rules_file=str(rules_file))
        self._rules = read(terms.rules, "", version="1")

    @property
    def mode(self) -> str:
        """Of accounts."""
        return self._config.mode

    @property
    def refuses(self) -> bool:
        """Whether budgets or rates may end a request."""
        return self.mode == "enforce" and (self._terms.bounds or self._config.when_away == "refuse")

    def key_of(self, asked: Asked) -> Key:
        """Whose request it is."""
        return self._terms.keys["k0" if asked.number % 3 else "k1"]

    def class_of(self, asked: Asked) -> PriorityClass:
        """Of its bill."""
        return PriorityClass.BATCH if asked.number % 4 == 0 else PriorityClass.DEFAULT

    def link(self) -> AccountsLink:
        """Of one start of a front proxy."""
        link = AccountsLink(None, self._config, self._terms.limits)
        excuse_grants(link, self._rules, self._excused)
        return link

    def accounting(self, shell: SchedulerShell) -> Accounting | None:
        """Of one start of a scheduler."""
        if self.mode == "off":
            return None
        terms = self._terms
        made = Accounting(
            AuthConfig(),
            self._config,
            shell.reply,
            place=shell.feed,
            answer=shell.answer,
            lost=asyncio.Event(),
            books=SimBooks(self._path, clock_s=self._wall_s),
            limits=terms.limits,
        )
        assert made.usage is not None
        made.usage.use_keys(terms.keys)
        WatchedTreasury(made.usage.treasury, self._world, terms.limits, self._excused, enforces=self.mode == "enforce")
        return made

    def _wall_s(self) -> float:
        return self._world.now_s + 2 * _DAY_S - self._terms.midnight_s

    def check_the_end(self, cluster: SimCluster) -> None:
        """One record a request whose front proxy lives, of what its client saw; totals are their sums."""
        if self.mode == "off":
            return
        ledger = SimLedger(self._path, timezone="UTC")
        problems = ledger.verify()[3]
        records = {record.uid: record for record in ledger.records(most=1_000)}
        ledger.close()
        hold(Invariant.BILLED, not problems, "totals are not the sums of records", problems)
        price = self._rules.price(MODEL)
        for client in cluster.clients.values():
            if client.bill is None or not client.bill.asked or client.outcome in ("", "front_died"):
                continue
            record = records.get(client.bill.uid)
            link = client.front.accounts
            if not client.front.alive or link is None or link.holds_record(client.bill.uid):
                continue
            hold(Invariant.BILLED, record is not None, "a request has no record", client.asked)
            assert record is not None
            prompt_tokens = client.asked.prompt_tokens if client.tokens else 0
            amount = price.amount(prompt_tokens, 0, client.tokens, self.class_of(client.asked))
            told = record.prompt_tokens, record.output_tokens, record.amount, record.estimated
            right = told == (prompt_tokens, client.tokens, amount, False)
            hold(Invariant.BILLED, right, "another bill", (client.asked, record, client.tokens))

    def check_leader(self, cluster: SimCluster, accounting: Accounting) -> None:
        """With every front proxy connected nothing is held, and the leader knows what the ledger has."""
        assert accounting.usage is not None
        treasury = accounting.usage.treasury
        # Those of a front proxy that died are settled after a while.
        told_s = cluster.world.now_s - TOLD_S_MAX
        left = [each.ask for each in treasury._holds.values() if treasury._gone.get(each.front, 0.0) < told_s]
        hold(Invariant.RETURNED, not left, "a hold has no request", left)
        ledger = SimLedger(self._path, timezone="UTC")
        for name, account in treasury._accounts.items():
            totals = ledger.totals(account.starts)
            for window, start_s, spent in zip(WINDOWS, account.starts, account.spents, strict=True):
                same = totals.get((name, window, start_s), 0) == spent.settled and not spent.late
                seen = (name, window, totals.get((name, window, start_s)), spent.settled, spent.late)
                hold(Invariant.BILLED, same, "the leader counts other than the ledger", seen)
        ledger.close()

    def close(self) -> None:
        """The run is over."""
        self._folder.cleanup()
