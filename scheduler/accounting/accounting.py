"""Keys and accounts of one scheduler: opened when it leads, told of front proxies, closed at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accounts.config import AccountsConfig, AuthConfig
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.user_error import UserError
from scheduler.accounting.books import Books
from scheduler.accounting.keys_desk import KeysDesk
from scheduler.accounting.secrets_folder import admin_key, pepper

Send = Callable[[int, pb.FrontReply], None]
"""Sends a reply to one front proxy's session, if it is still open."""


class Accounting:
    """What the shell has beside its core. ``keys``: None where none are required."""

    def __init__(self, auth: AuthConfig, accounts: AccountsConfig, books: Books, send: Send) -> None:
        """Raises UserError for secrets that cannot be read."""
        self.books = books
        self.keys: KeysDesk | None = None
        if auth.mode == "required":
            self.keys = KeysDesk(
                books,
                pepper=pepper(auth),
                admin_key=admin_key(auth),
                max_age_s=auth.keys_max_age_s,
                push=lambda session, table: send(session, pb.FrontReply(keys=table)),
            )

    async def open(self, leader_epoch: int) -> None:
        """Take the ledger over. Raises LedgerLost, or sqlite3.Error."""
        await self.books.open(leader_epoch)
        if self.keys is not None:
            await self.keys.open()

    async def close(self) -> None:
        """Write what waits, and let the ledger go."""
        await self.books.close()

    def joined(self, session: int, front_proxy_id: str) -> None:
        """A front proxy opened a stream."""
        if self.keys is not None:
            self.keys.joined(session, front_proxy_id)

    def left(self, session: int) -> None:
        """Its stream ended."""
        if self.keys is not None:
            self.keys.left(session)

    def tick(self) -> None:
        """Time passed."""
        if self.keys is not None:
            self.keys.forget_gone()


def accounting_of(auth: AuthConfig, accounts: AccountsConfig, send: Send) -> Accounting | None:
    """None where neither keys nor accounts are wanted. Raises UserError."""
    if auth.mode == "off" and accounts.mode == "off":
        return None
    if not accounts.ledger_file:
        raise UserError("accounts.ledger_file must be set: keys and usage are kept there")
    return Accounting(auth, accounts, Books(Path(accounts.ledger_file).expanduser()), send)
