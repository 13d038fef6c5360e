"""Usage in the scheduler: records of front proxies to the ledger, many at a time, and the word that they are booked.

What may run is decided by ``accounts.treasury``; this holds its clock, its timers and its queue.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence

import msgspec
import structlog

from accounts.config import LIMITS, AccountsConfig, AccountsLimits
from accounts.key_table import Key
from accounts.rules import Rules
from accounts.treasury import Treasury
from accounts.usage import UsageRecord
from accounts.windows import WINDOWS
from protos.accounts.v1 import accounts_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from scheduler.accounting.books import Books
from scheduler.accounting.ledger import LedgerLost
from scheduler.accounting.reply import Send

log = structlog.get_logger(__name__)

RETRY_S = 1.0
"""Pause after the ledger took no records."""


class UsageDesk:
    """Of the scheduler that leads. ``open`` comes before all else."""

    def __init__(
        self,
        config: AccountsConfig,
        rules: Rules,
        books: Books,
        send: Send,
        *,
        lost: asyncio.Event,
        limits: AccountsLimits = LIMITS,
    ) -> None:
        """``lost``: set when another scheduler has taken the ledger over."""
        self.treasury = Treasury(
            rules, {}, slice_tokens=config.slice_tokens, enforce=config.mode == "enforce", limits=limits
        )
        self._books = books
        self._send = send
        self._limits = limits
        self._lost = lost
        # Each with the session that told it; None: the scheduler itself.
        self._waiting: list[tuple[UsageRecord, int | None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None:
        """Read what was used in the present windows."""
        wall_s = self._books.wall_s()
        totals = await self._books.call(lambda ledger: ledger.totals(ledger.calendar.at(wall_s)))
        self.treasury.load(totals, self._loop.time(), wall_s)

    async def close(self) -> None:
        """Write what waits."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            await self._writing
        if self._waiting:
            await self._write()

    def use_keys(self, keys: Mapping[str, Key]) -> None:
        """The table of keys changed."""
        self.treasury.configure(self.treasury.rules, keys, self._loop.time())

    def use_rules(self, rules: Rules) -> None:
        """Other prices, teams and limits hold from now on."""
        self.treasury.configure(rules, self.treasury.keys, self._loop.time())

    def usage(self, session: int, packed: bytes) -> None:
        """A front proxy says that a request is over. Raises ValueError for what is no record."""
        self._settle(msgspec.msgpack.decode(packed, type=UsageRecord), session)

    def levels(self, scope: str) -> list[accounts_pb2.LimitLevel]:
        """Each limit of a scope, and how far it is used."""
        now_s = self._loop.time()
        account = self.treasury.account(scope, now_s, self._books.wall_s())
        told = [
            accounts_pb2.LimitLevel(
                scope=scope, name=f"budget {budget.window}", limit=budget.amount, used=spent.settled, held=spent.held
            )
            for budget in account.limits.budgets
            for spent in (account.spents[WINDOWS.index(budget.window)],)
        ]
        for bucket in account.buckets:
            missing = max(0, round(bucket.per_minute - bucket.level(now_s)))
            told.append(accounts_pb2.LimitLevel(scope=scope, name=bucket.name, limit=bucket.per_minute, used=missing))
        if (most := account.limits.concurrent_requests) is not None:
            told.append(
                accounts_pb2.LimitLevel(scope=scope, name="concurrent_requests", limit=most, held=account.running)
            )
        return told

    def _settle(self, record: UsageRecord, session: int | None) -> None:
        settled, _ = self.treasury.settle(record, self._loop.time(), self._books.wall_s())
        self._queue(settled, session)

    def _queue(self, record: UsageRecord, session: int | None) -> None:
        if len(self._waiting) >= self._limits.records_max:
            # Its front proxy has it still, and tells it again on its next stream.
            self.treasury.booked(record.uid, 0)
            return
        self._waiting.append((record, session))
        if self._timer is None and self._writing is None:
            self._timer = self._loop.call_later(self._limits.commit_interval_s, self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._writing = self._loop.create_task(self._write())

    async def _write(self) -> None:
        """Write all that waits in one transaction, and say so."""
        batch, self._waiting = self._waiting, []
        pause_s = self._limits.commit_interval_s
        try:
            records = [record for record, _ in batch]
            booked = await self._books.call(lambda ledger: ledger.book(records))
        except LedgerLost as error:
            log.critical("another scheduler has the ledger", why=str(error))
            self._lost.set()
        except sqlite3.Error as error:
            if not self.treasury.ledger_away:
                log.error("the ledger takes no records", ledger=str(self._books.path), why=str(error))
            self.treasury.ledger_away = True
            self._waiting = [*batch, *self._waiting]
            pause_s = RETRY_S
        else:
            if self.treasury.ledger_away:
                log.warning("the ledger takes records again", ledger=str(self._books.path))
            self.treasury.ledger_away = False
            self._tell(batch, booked)
        self._writing = None
        if self._waiting and not self._lost.is_set():
            self._timer = self._loop.call_later(pause_s, self._begin)

    def _tell(self, batch: Sequence[tuple[UsageRecord, int | None]], booked: Sequence[int]) -> None:
        uids: dict[int, list[bytes]] = {}
        for (record, session), amount in zip(batch, booked, strict=True):
            self.treasury.booked(record.uid, amount)
            if session is not None:
                uids.setdefault(session, []).append(record.uid)
        for session, told in uids.items():
            self._send(session, pb.FrontReply(booked=accounts_pb2.UsageBooked(uids=told)))
