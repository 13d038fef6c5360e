"""Keys and accounts of one scheduler: opened when it leads, told of front proxies, closed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accounts.config import LIMITS, AccountsConfig, AccountsLimits, AuthConfig
from accounts.key_table import Key
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.configuration import BadConfiguration
from runtime.user_error import UserError
from scheduler.accounting import rules_file
from scheduler.accounting.books import Books
from scheduler.accounting.keys_desk import KeysDesk
from scheduler.accounting.secrets_folder import admin_key, pepper
from scheduler.accounting.usage_desk import Send, UsageDesk
from scheduler.api.actions import ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested


class Accounting:
    """What the shell has beside its core. ``keys`` None: none are required. ``usage`` None: nothing is counted."""

    def __init__(
        self,
        auth: AuthConfig,
        accounts: AccountsConfig,
        send: Send,
        *,
        place: Callable[[PlanRequested], None],
        answer: Callable[[ReplyWaiting | ReplyRefusal], None],
        lost: asyncio.Event,
        model: str = "",
        books: Books | None = None,
        limits: AccountsLimits = LIMITS,
    ) -> None:
        """``place`` and ``answer``: see UsageDesk. ``lost``: set when this scheduler must end.

        ``model``: the one that serves; empty: not known here. Raises BadConfiguration, and UserError for secrets that
        cannot be read.
        """
        self._loop = asyncio.get_running_loop()
        # Front proxies that left, with the time of it: the ledger forgets them when nothing of them holds any more.
        self._sessions: dict[int, str] = {}
        self._gone: dict[str, float] = {}
        self._forget_after_s = max(auth.keys_max_age_s, limits.unknown_after_s)
        self.on_rules: Callable[[], object] = lambda: None
        """Called when other rules hold."""
        self._accounts = accounts
        self._model = model
        rules = rules_file.read(accounts, model)
        self.books = books or Books(Path(accounts.ledger_file).expanduser(), timezone=rules.timezone)
        self.usage: UsageDesk | None = None
        if accounts.mode != "off":
            self.usage = UsageDesk(
                accounts, rules, self.books, send, place=place, answer=answer, lost=lost, limits=limits
            )
        self.keys: KeysDesk | None = None
        if auth.mode == "required":
            self.keys = KeysDesk(
                self.books,
                pepper=pepper(auth),
                admin_key=admin_key(auth),
                max_age_s=auth.keys_max_age_s,
                push=lambda session, table: send(session, pb.FrontReply(keys=table)),
            )
            self.keys.on_change = self._on_keys

    async def open(self, leader_epoch: int) -> None:
        """Take the ledger over. Raises LedgerLost, or UserError for a file that cannot be used."""
        await self.books.open(leader_epoch)
        self._gone = dict.fromkeys(self.books.fronts_before, self._loop.time())
        if self.usage is not None:
            await self.usage.open()
        if self.keys is not None:
            await self.keys.open()

    async def close(self) -> None:
        """Write what waits, and let the ledger go."""
        if self.usage is not None:
            await self.usage.close()
        await self.books.close()

    def joined(self, session: int, front_proxy_id: str) -> None:
        """A front proxy opened a stream."""
        self._gone.pop(front_proxy_id, None)
        self._sessions[session] = front_proxy_id
        self.books.post(lambda ledger: ledger.see_front(front_proxy_id))
        if self.usage is not None:
            self.usage.joined(session, front_proxy_id)
        if self.keys is not None:
            self.keys.joined(session, front_proxy_id)

    def left(self, session: int) -> None:
        """Its stream ended."""
        front = self._sessions.pop(session)
        if front not in self._sessions.values():
            self._gone[front] = self._loop.time()
        if self.usage is not None:
            self.usage.left(session)
        if self.keys is not None:
            self.keys.left(session)

    def tick(self) -> None:
        """Time passed."""
        over_s = self._loop.time() - self._forget_after_s
        for front in [front for front, left_s in self._gone.items() if left_s <= over_s]:
            del self._gone[front]
            self.books.post(lambda ledger, front=front: ledger.forget_front(front))  # type: ignore[misc]
        if self.usage is not None:
            self.usage.tick()
        if self.keys is not None:
            self.keys.forget_gone()

    async def reload(self, actor: str) -> tuple[str, Sequence[str]]:
        """Read the rules again: their version, and what looks like a mistake. On an error the former ones stay.

        Raises BadConfiguration, LedgerLost, or sqlite3.Error.
        """
        usage = self.usage
        if usage is None:
            raise BadConfiguration("accounts.mode", "is off: there are no rules", "configuration")
        rules = rules_file.read(self._accounts, self._model)
        if rules.timezone != usage.treasury.rules.timezone:
            why = "windows move with it: it changes at the next start of the scheduler"
            raise BadConfiguration("timezone", why, self._accounts.rules_file)
        keys = {} if self.keys is None else self.keys.table.keys
        found = rules_file.warnings(rules, keys.values(), self._accounts.rules_file) if self.keys is not None else []
        at_s = self.books.wall_s()
        await self.books.call(
            lambda ledger: ledger.note(at_s=at_s, actor=actor, action="rules.reload", subject=rules.version)
        )
        usage.use_rules(rules)
        self.on_rules()
        return rules.version, found

    def _on_keys(self, keys: Mapping[str, Key]) -> None:
        if self.usage is not None:
            self.usage.use_keys(keys)


def accounting_of(auth: AuthConfig, accounts: AccountsConfig, send: Send, **rest: Any) -> Accounting | None:
    """None where neither keys nor accounts are wanted. Raises UserError."""
    if auth.mode == "off" and accounts.mode == "off":
        return None
    if not accounts.ledger_file:
        raise UserError("accounts.ledger_file must be set: keys and usage are kept there")
    return Accounting(auth, accounts, send, **rest)
