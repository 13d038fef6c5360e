"""Usage in the scheduler: records of front proxies to the ledger, many at a time, and the word that they are booked.

What may run is decided by ``accounts.treasury``; this holds its clock, its timers and its queue.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from accounts.config import LIMITS, AccountsConfig, AccountsLimits
from accounts.key_table import Key
from accounts.rules import Rules
from accounts.treasury import HoldAsked, PartTold, Reason, Refused, Treasury
from accounts.usage import UsageRecord, records_of
from accounts.windows import WINDOWS
from protos.accounts.v1 import accounts_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.failures import Failure, FailureKind
from scheduler.accounting.books import Books
from scheduler.accounting.ledger import LedgerLost
from scheduler.api.actions import ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested

log = structlog.get_logger(__name__)

_KINDS: dict[Reason, tuple[FailureKind, str]] = {
    "rate": (FailureKind.EXHAUSTED, "rate_limit_exceeded"),
    "concurrency": (FailureKind.EXHAUSTED, "rate_limit_exceeded"),
    "budget": (FailureKind.EXHAUSTED, "insufficient_quota"),
    "rebuilding": (FailureKind.UNAVAILABLE, ""),
    "ledger": (FailureKind.UNAVAILABLE, ""),
    "key": (FailureKind.UNAUTHENTICATED, "invalid_api_key"),
}
_PARTS = msgspec.msgpack.Decoder(list[PartTold])
Send = Callable[[int, pb.FrontReply], None]
"""Sends a reply to one front proxy's session, if it is still open."""
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
        place: Callable[[PlanRequested], None],
        answer: Callable[[ReplyWaiting | ReplyRefusal], None],
        lost: asyncio.Event,
        limits: AccountsLimits = LIMITS,
    ) -> None:
        """``place``: what holds what it needs is asked of the core. ``answer``: what is not.

        ``lost``: set when another scheduler has taken the ledger over.
        """
        self.treasury = Treasury(
            rules, {}, slice_tokens=config.slice_tokens, enforce=config.mode == "enforce", limits=limits
        )
        self._books = books
        self._send = send
        self._place = place
        self._answer = answer
        self._limits = limits
        self._lost = lost
        # The front proxy of each session.
        self._fronts: dict[int, str] = {}
        # The last stream of each.
        self._newest: dict[str, int] = {}
        # Questions that wait for a rate to have room, in the order of their coming, with the end of their wait.
        self._asking: dict[tuple[int, int], tuple[PlanRequested, float]] = {}
        # Each with the session that told it; None: the scheduler itself.
        self._waiting: list[tuple[UsageRecord, int | None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None:
        """Read what was used in the present windows."""
        wall_s = self._books.wall_s()
        totals = await self._books.call(lambda ledger: ledger.totals(ledger.calendar.at(wall_s)))
        self.treasury.load(totals, self._loop.time(), wall_s)
        self.treasury.expect(self._books.fronts_before, self._loop.time())

    async def close(self) -> None:
        """Write what waits."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            await self._writing
        for _ in range(0, len(self._waiting), self._limits.commit_records_max):
            await self._write()

    async def write(self) -> None:
        """Have what waits in the ledger, unless that takes no records."""
        for _ in range(self._limits.records_max // self._limits.commit_records_max + 1):
            self._write_now()
            if self._writing is None or self.treasury.ledger_away:
                return
            await asyncio.shield(self._writing)

    def _write_now(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._begin()

    def use_keys(self, keys: Mapping[str, Key]) -> None:
        """The table of keys changed."""
        self.treasury.configure(self.treasury.rules, keys, self._loop.time())

    @property
    def weights(self) -> Mapping[str, float]:
        """Of teams, in the fair share."""
        return {name: team.weight for name, team in self.treasury.rules.teams.items()}

    def use_rules(self, rules: Rules) -> None:
        """Other prices, teams and limits hold from now on."""
        self.treasury.configure(rules, self.treasury.keys, self._loop.time())

    # Front proxies

    def joined(self, session: int, front_proxy_id: str) -> None:
        """A front proxy opened a stream."""
        self._fronts[session] = front_proxy_id
        self._newest[front_proxy_id] = session

    def left(self, session: int) -> None:
        """Its stream ended: what it runs goes on, or not."""
        front = self._fronts.pop(session)
        for key in [key for key in self._asking if key[0] == session]:
            del self._asking[key]
        if front not in self._fronts.values():
            del self._newest[front]
            self.treasury.left(front, self._loop.time())

    def told(self, session: int, packed: bytes) -> None:
        """All that holds something in a front proxy. Raises ValueError for what cannot be read."""
        parts = _PARTS.decode(packed)
        now_s, wall_s = self._loop.time(), self._books.wall_s()
        self._queue(self.treasury.told(self._fronts[session], parts, now_s, wall_s), None)
        if not parts:
            # It has just come, or leaves and waits for what it told.
            self._write_now()
        self._ask_again()

    def tick(self) -> None:
        """Time passed."""
        self._queue(self.treasury.due(self._loop.time(), self._books.wall_s()), None)
        self._ask_again()

    # Requests

    def ask(self, event: PlanRequested) -> None:
        """Let a request hold what it needs first, then place it; or let it wait; or refuse it."""
        front = self._fronts[event.session]
        if self._newest[front] != event.session:
            # Of a stream that its front proxy has given up: on the next one it may have told the end of this request.
            return
        refused = self._hold(event, front)
        if refused is None:
            self._place(event)
            return
        if not refused.may_wait or len(self._asking) >= self._limits.waiting_max:
            self._refuse(event, refused)
            return
        wait_max_s = min(self._limits.wait_max_s, event.wait_max_s or self._limits.wait_max_s)
        self._asking[event.session, event.plan_id] = event, self._loop.time() + wait_max_s
        self._answer(ReplyWaiting(session=event.session, plan_id=event.plan_id, wait_max_s=wait_max_s))

    def ended(self, session: int, plan_id: int) -> None:
        """A plan is over, or its question is taken back."""
        if self._asking:
            self._asking.pop((session, plan_id), None)

    def extend(self, session: int, asked: accounts_pb2.ExtendHold) -> None:
        """A request needs more output than it holds."""
        granted = self.treasury.extend(asked.uid, asked.part, asked.beyond_tokens, self._loop.time())
        if granted is not None:
            told = accounts_pb2.HoldExtended(
                uid=asked.uid, part=asked.part, output_tokens=granted, beyond_tokens=asked.beyond_tokens
            )
            self._send(session, pb.FrontReply(extended=told))

    def tell_grant(self, ask: HoldAsked, message: pb.Plan) -> None:
        """Say in a plan what its request holds."""
        held = self.treasury.granted(ask, self._loop.time())
        if held is not None:
            message.granted_tokens = held.granted_tokens
            if held.standing is not None:
                message.rates = msgspec.msgpack.encode(held.standing)

    def _hold(self, event: PlanRequested, front: str) -> Refused | None:
        assert event.hold is not None
        return self.treasury.hold(event.hold, front, self._loop.time(), self._books.wall_s())

    def _ask_again(self) -> None:
        """Try those that wait, each team's in order: behind one that has no room its team's others wait too."""
        full: set[str] = set()
        now_s = self._loop.time()
        for key, (event, until_s) in list(self._asking.items()):
            assert event.hold is not None
            if event.hold.team in full and now_s < until_s:
                continue
            refused = self._hold(event, self._fronts[event.session])
            if refused is None:
                del self._asking[key]
                self._place(event)
            elif not refused.may_wait or now_s >= until_s:
                del self._asking[key]
                self._refuse(event, refused)
            else:
                full.add(event.hold.team)

    def _refuse(self, event: PlanRequested, refused: Refused) -> None:
        kind, code = _KINDS[refused.reason]
        failure = Failure(kind=kind, message=refused.message, retry_after_s=refused.retry_after_s, code=code)
        self._answer(
            ReplyRefusal(
                session=event.session,
                plan_id=event.plan_id,
                failure=failure,
                cause=f"account_{refused.reason}",
                standing=refused.standing,
            )
        )

    # Records

    def records(self, session: int, packed: bytes) -> int:
        """A front proxy says that requests are over. How many of its records cannot be read, and were set aside."""
        records, unread = records_of(packed)
        now_s, wall_s, settle = self._loop.time(), self._books.wall_s(), self.treasury.settle
        for record in records:
            settle(record, now_s, wall_s)
        self._queue(records, session)
        for uid, why in unread:
            log.error("a usage record cannot be read", uid=uid.hex(), front_proxy=self._fronts[session], why=why)
            if (estimated := self.treasury.set_aside(uid, now_s, wall_s)) is not None:
                self._queue((estimated,), session)
            elif uid:
                # Told again it would be no better.
                self._send(session, pb.FrontReply(booked=accounts_pb2.UsageBooked(uids=[uid])))
        if self._asking:
            self._ask_again()
        return len(unread)

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

    def _queue(self, records: Sequence[UsageRecord], session: int | None) -> None:
        room = max(0, self._limits.records_max - len(self._waiting))
        if len(records) > room:
            for record in records[room:]:
                # Its front proxy has it still, and tells it again on its next stream.
                self.treasury.booked(record.uid, 0)
            records = records[:room]
        self._waiting += [(record, session) for record in records]
        if self._waiting and self._timer is None and self._writing is None:
            self._timer = self._loop.call_later(self._limits.commit_interval_s, self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._writing = self._loop.create_task(self._write())

    async def _write(self) -> None:
        """Write what waits in one transaction, and say so."""
        most = self._limits.commit_records_max
        batch, self._waiting = self._waiting[:most], self._waiting[most:]
        pause_s = self._limits.commit_interval_s if len(self._waiting) < most else 0.0
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
        if self._waiting and not self._closing and not self._lost.is_set():
            self._timer = self._loop.call_later(pause_s, self._begin)

    def _tell(self, batch: Sequence[tuple[UsageRecord, int | None]], booked: Sequence[int]) -> None:
        uids: dict[int, list[bytes]] = {}
        for (record, session), amount in zip(batch, booked, strict=True):
            self.treasury.booked(record.uid, amount)
            if session is not None:
                uids.setdefault(session, []).append(record.uid)
        for session, told in uids.items():
            reply = pb.FrontReply()
            reply.booked.uids.extend(told)
            self._send(session, reply)
