"""Prices, teams and limits, read from an operator's TOML file. Reads no file itself.

Amounts are integers of nano-units: 10^-9 of the cluster's currency. A price of 0.001 a million tokens is 1 a token, so
every sum is exact.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import msgspec

from accounts.rates import BUCKETS
from accounts.windows import WINDOWS, Window
from runtime.configuration import BadConfiguration
from runtime.priority_class import PriorityClass

NANO = 10**9
_PER_MILLION = NANO // 10**6
TEAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TEAM_NAME_RULE = "a team's name has letters, digits, dots, dashes and underscores, 64 at most"

T = TypeVar("T")


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model, in nano-units a token. ``batch_permille``: what requests of class batch pay, in thousandths."""

    prompt: int
    cached: int
    output: int
    batch_permille: int = 1000

    def amount(self, uncached: int, cached: int, output: int, priority_class: str) -> int:
        """What so many tokens cost, in nano-units, rounded up."""
        whole = uncached * self.prompt + cached * self.cached + output * self.output
        return -(-whole * self.batch_permille // 1000) if priority_class == PriorityClass.BATCH else whole


FREE = Price(prompt=0, cached=0, output=0)


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """At most so much, in nano-units, in each of these windows."""

    amount: int
    window: Window


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds one scope. None: nothing does. Rates are a minute, which is also how much may come at once."""

    budgets: tuple[Budget, ...] = ()
    requests_per_minute: int | None = None
    prompt_tokens_per_minute: int | None = None
    """Tokens of prompts that were not found in a cache."""
    output_tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


RATES = (*BUCKETS, "concurrent_requests")


class Team(msgspec.Struct, frozen=True, kw_only=True):
    """One team: its part of the cluster, and its bounds."""

    weight: float = 1.0
    limits: Limits = Limits()
    waits: frozenset[PriorityClass] = frozenset({PriorityClass.BATCH})
    """Classes whose requests wait where a rate limit has no room; those of others are refused."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """All of a file. ``version``: a digest of its text, which records keep."""

    version: str = ""
    currency: str = "EUR"
    timezone: str = "UTC"
    prices: Mapping[str, Price] = {}
    cluster: Limits = Limits()
    teams: Mapping[str, Team] = {}

    def price(self, model: str) -> Price:
        """Of a model; nothing where the file names none."""
        return self.prices.get(model, FREE)

    def shown(self, amount: int) -> str:
        """An amount as people read it."""
        return f"{Decimal(amount) / NANO:,.6f}".rstrip("0").rstrip(".") + f" {self.currency}"


def read(text: str, source: str, *, version: str = "", model: str = "") -> Rules:
    """The rules. ``model``: one that is served and must have a price. Raises BadConfiguration with the path."""
    try:
        tree = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise BadConfiguration("", str(error), source) from error
    reader = _Reader(source)
    reader.known("", tree, ("currency", "timezone", "prices", "cluster", "teams"))
    zone = tree.get("timezone", "UTC")
    try:
        ZoneInfo(zone)
    except (ValueError, OSError, TypeError, LookupError):
        raise BadConfiguration("timezone", f"there is no time zone {zone!r}", source) from None
    rules = Rules(
        version=version,
        currency=reader.of_type("currency", tree.get("currency", "EUR"), str),
        timezone=zone,
        prices={name: reader.price(f"prices.{name}", one) for name, one in reader.table("prices", tree).items()},
        cluster=reader.limits("cluster", reader.table("cluster", tree)),
        teams={name: reader.team(name, one) for name, one in reader.table("teams", tree).items()},
    )
    if model and model not in rules.prices:
        raise BadConfiguration("prices", f"the served model {model!r} has no price", source)
    return rules


def budget(text: str) -> Budget:
    """What ``50/month`` says. Raises ValueError."""
    amount, slash, window = text.partition("/")
    if not slash or window not in WINDOWS:
        raise ValueError(f"a budget is an amount and a window, such as 50/month: one of {', '.join(WINDOWS)}")
    return Budget(amount=_nano(amount, NANO), window=window)


def budget_text(one: Budget) -> str:
    """The same as text."""
    return f"{Decimal(one.amount) / NANO:f}/{one.window}"


def limits_of(budgets: Iterable[str], rates: Iterable[str]) -> Limits:
    """Limits from texts such as ``50/month`` and ``requests_per_minute=60``. Raises ValueError."""
    given: dict[str, int] = {}
    for text in rates:
        name, _, number = text.partition("=")
        if name not in RATES or not number.isdecimal() or not int(number):
            raise ValueError(f"a limit is a name and a number above 0, such as {RATES[0]}=60, got {text!r}")
        given[name] = int(number)
    return Limits(budgets=tuple(budget(text) for text in budgets), **given)


def _nano(value: object, unit: int) -> int:
    """A number times ``unit``, which must be whole. Raises ValueError."""
    try:
        nano = Decimal(str(value)) * unit
    except InvalidOperation:
        raise ValueError(f"must be a number, got {value!r}") from None
    if not nano.is_finite() or nano < 0 or nano != nano.to_integral_value():
        raise ValueError(f"must be at least 0 and a multiple of {Decimal(1) / unit:f}, got {value}")
    return int(nano)


class _Reader:
    """Checks what a file says; every error has the path."""

    def __init__(self, source: str) -> None:
        self._source = source

    def bad(self, path: str, why: str) -> BadConfiguration:
        return BadConfiguration(path, why, self._source)

    def known(self, path: str, tree: Mapping[str, Any], names: Sequence[str]) -> None:
        for name in tree:
            if name not in names:
                raise self.bad(f"{path}.{name}".lstrip("."), f"is not known; known are {', '.join(names)}")

    def of_type(self, path: str, value: object, kind: type[T]) -> T:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.bad(path, f"must be {kind.__name__}, got {value!r}")
        return value

    def table(self, path: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        return self.of_type(path, tree.get(path.rpartition(".")[2], {}), dict)

    def nano(self, path: str, value: object, unit: int) -> int:
        try:
            return _nano(value, unit)
        except ValueError as error:
            raise self.bad(path, str(error)) from None

    def price(self, path: str, tree: object) -> Price:
        given = self.of_type(path, tree, dict)
        names = ("prompt_per_million", "cached_per_million", "output_per_million")
        self.known(path, given, (*names, "batch_factor"))
        if missing := [name for name in names if name not in given]:
            raise self.bad(f"{path}.{missing[0]}", "is missing")
        prompt, cached, output = (self.nano(f"{path}.{name}", given[name], _PER_MILLION) for name in names)
        if cached > prompt:
            raise self.bad(f"{path}.cached_per_million", "must not be more than prompt_per_million")
        permille = self.nano(f"{path}.batch_factor", given.get("batch_factor", 1), 1000)
        return Price(prompt=prompt, cached=cached, output=output, batch_permille=permille)

    def limits(self, path: str, tree: Mapping[str, Any], beside: Sequence[str] = ()) -> Limits:
        self.known(path, tree, ("budgets", *RATES, *beside))
        budgets = []
        for index, each in enumerate(self.of_type(f"{path}.budgets", tree.get("budgets", []), list)):
            try:
                budgets.append(budget(self.of_type(f"{path}.budgets[{index}]", each, str)))
            except ValueError as error:
                raise self.bad(f"{path}.budgets[{index}]", str(error)) from None
        rates: dict[str, int] = {}
        for name in RATES:
            if name in tree:
                rates[name] = self.of_type(f"{path}.{name}", tree[name], int)
                if rates[name] < 1:
                    raise self.bad(f"{path}.{name}", f"must be at least 1, got {rates[name]}")
        return Limits(budgets=tuple(budgets), **rates)

    def team(self, name: str, tree: object) -> Team:
        path = f"teams.{name}"
        given = self.of_type(path, tree, dict)
        if not TEAM_NAME.fullmatch(name):
            raise self.bad(path, TEAM_NAME_RULE)
        weight = given.get("weight", 1)
        if not isinstance(weight, int | Decimal) or isinstance(weight, bool) or not 0 < weight <= NANO:
            raise self.bad(f"{path}.weight", f"must be a number above 0, got {weight!r}")
        on_empty = self.of_type(f"{path}.on_empty", given.get("on_empty", {}), dict)
        waits = {PriorityClass.BATCH}
        for each, what in on_empty.items():
            if each not in tuple(PriorityClass) or what not in ("refuse", "wait"):
                raise self.bad(f"{path}.on_empty.{each}", "must be a priority class, and `refuse` or `wait`")
            (waits.add if what == "wait" else waits.discard)(PriorityClass(each))
        limits = self.limits(path, given, ("weight", "on_empty"))
        return Team(weight=float(weight), limits=limits, waits=frozenset(waits))
