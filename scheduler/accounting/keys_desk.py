"""Keys in the scheduler: the table, which front proxies have it, and what operators change. Stores by the ledger alone.

A front proxy asks, says which version it has, and may use its table for ``keys_max_age_s`` from that moment if it gets
an answer. So a change holds everywhere once each front proxy has asked with the new version, or has had no answer
for that long.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence

import msgspec

from accounts.config import LIMITS
from accounts.key_table import Denied, Key, KeyTable
from accounts.keys import digest_of, id_of, mint
from protos.accounts.v1 import accounts_pb2
from runtime.failures import Failure, FailureError, FailureKind
from scheduler.accounting.books import Books

Push = Callable[[int, accounts_pb2.KeyTable], None]
"""Sends it to one front proxy's session."""


class _Front:
    """What one front proxy may accept. ``session``: its present stream; None: it has none."""

    __slots__ = ("left_s", "session", "version")

    def __init__(self, session: int | None, left_s: float) -> None:
        self.session = session
        self.version = 0
        self.left_s = left_s


class KeysDesk:
    """The table of the leader. ``open`` comes before all else."""

    def __init__(self, books: Books, *, pepper: bytes, admin_key: str, max_age_s: float, push: Push) -> None:
        """``books``: the ledger. ``admin_key``: the one of the secrets' folder; it is in no ledger."""
        self.table = KeyTable(pepper=pepper)
        self.on_change: Callable[[Mapping[str, Key]], None] = lambda _keys: None
        """Told of every new table."""
        self._books = books
        self._pepper = pepper
        self._max_age_s = max_age_s
        self._push = push
        self._admin = _admin_row(admin_key, pepper)
        self._fronts: dict[str, _Front] = {}
        self._sessions: dict[int, str] = {}
        self._told = asyncio.Event()
        self._changing = asyncio.Lock()
        self._now_s = asyncio.get_running_loop().time

    async def open(self) -> None:
        """Read the table. Front proxies that were there may have an older one."""
        version, keys = await self._books.call(lambda ledger: ledger.keys())
        self._fronts = {name: _Front(None, self._now_s()) for name in self._books.fronts_before}
        self._use(keys, version)

    # Front proxies

    def joined(self, session: int, front_proxy_id: str) -> None:
        """A front proxy opened a stream."""
        self._sessions[session] = front_proxy_id
        front = self._fronts.setdefault(front_proxy_id, _Front(None, self._now_s()))
        front.session, front.version = session, 0

    def left(self, session: int) -> None:
        """Its stream ended: it may go on with what it has for a while."""
        front = self._fronts.get(self._sessions.pop(session, ""))
        if front is not None and front.session == session:
            front.session, front.left_s = None, self._now_s()
        self._told.set()

    def asked(self, session: int, message: accounts_pb2.KeysAsked) -> None:
        """A front proxy has this version."""
        front = self._fronts.get(self._sessions.get(session, ""))
        if front is not None and front.session == session:
            front.version = max(front.version, message.version)
        self._tell(session, known=message.version, number=message.number)
        self._told.set()

    def forget_gone(self) -> None:
        """Front proxies whose table is too old by now. Call it from time to time."""
        gone = [name for name, front in self._fronts.items() if self._over(front)]
        for name in gone:
            del self._fronts[name]

    def _over(self, front: _Front) -> bool:
        return front.session is None and front.left_s + self._max_age_s <= self._now_s()

    def _tell(self, session: int, *, known: int, number: int = 0) -> None:
        fresh = known == self.table.version
        self._push(
            session,
            accounts_pb2.KeyTable(version=self.table.version, number=number, keys=b"" if fresh else self._packed),
        )

    # Operators

    def caller(self, shown: str, now_s: float) -> Key:
        """Whose key this is. Raises FailureError."""
        found = self.table.find(shown.encode(errors="replace"), now_s)
        if isinstance(found, Denied):
            raise FailureError(Failure(kind=FailureKind.UNAUTHENTICATED, message=found.value))
        return found

    async def create(self, key: Key, actor: str, now_s: float) -> tuple[str, str]:
        """Add a key with these rights; its id and what its owner sends."""
        async with self._changing:
            if len(self.table.keys) >= LIMITS.keys_max:
                raise _bad(f"there are {LIMITS.keys_max} keys already, the most that may be", FailureKind.EXHAUSTED)
            shown = mint(secrets.choice)
            key_id = id_of(shown)
            assert key_id is not None
            row = msgspec.structs.replace(
                key, key_id=key_id, digest=digest_of(shown, self._pepper), created_by=actor, created_at_s=now_s
            )
            await self._write(row, actor, "key.create", f"team={row.team}", now_s)
            return key_id, shown

    async def rotate(self, key_id: str, overlap_s: float, actor: str, now_s: float) -> str:
        """Give a key another secret; what its owner sends from now on. Raises FailureError."""
        async with self._changing:
            former = self._row(key_id)
            if former.revoked or 0 < former.expires_at_s <= now_s:
                raise _bad(f"Key {key_id} was revoked or has expired: make another one.", FailureKind.BAD_REQUEST)
            shown = mint(secrets.choice, key_id)
            digest = digest_of(shown, self._pepper)
            row = msgspec.structs.replace(
                former, digest=digest, old_digest=former.digest, old_until_s=now_s + overlap_s
            )
            await self._write(row, actor, "key.rotate", f"overlap_s={overlap_s:g}", now_s)
            return shown

    async def revoke(self, key_id: str, actor: str, now_s: float) -> tuple[Sequence[str], Sequence[str]]:
        """End a key; the front proxies that have said so, and those that were waited for. Raises FailureError."""
        async with self._changing:
            version = await self._write(
                msgspec.structs.replace(self._row(key_id), revoked=True), actor, "key.revoke", "", now_s
            )
        asked = dict(self._fronts)
        until_s = self._now_s() + self._max_age_s
        while waiting := [front for front in asked.values() if not self._holds(front, version, until_s)]:
            self._told.clear()
            over_s = min([until_s, *(front.left_s + self._max_age_s for front in waiting if front.session is None)])
            try:
                async with asyncio.timeout_at(over_s):
                    await self._told.wait()
            except TimeoutError:
                continue
        told = [name for name, front in asked.items() if front.version >= version]
        return told, [name for name in asked if name not in told]

    def _holds(self, front: _Front, version: int, until_s: float) -> bool:
        """Whether a front proxy accepts nothing any more that ``version`` does not have."""
        return front.version >= version or self._over(front) or self._now_s() >= until_s

    def _row(self, key_id: str) -> Key:
        row = self.table.keys.get(key_id)
        if row is None or row is self._admin:
            raise _bad(f"There is no key {key_id}.", FailureKind.NOT_FOUND)
        return row

    async def _write(self, row: Key, actor: str, action: str, detail: str, now_s: float) -> int:
        version = await self._books.call(
            lambda ledger: ledger.put_key(row, at_s=now_s, actor=actor, action=action, detail=detail)
        )
        self._use([*(each for each in self.table.keys.values() if each.key_id != row.key_id), row], version)
        for session in self._sessions:
            self._tell(session, known=0)
        return version

    def _use(self, keys: Sequence[Key], version: int) -> None:
        if self._admin is not None:
            keys = [*(key for key in keys if key.key_id != self._admin.key_id), self._admin]
        self.table = KeyTable(keys, version, self._pepper)
        self._packed = msgspec.msgpack.encode(list(self.table.keys.values()))
        self.on_change(self.table.keys)


def _admin_row(shown: str, pepper: bytes) -> Key | None:
    key_id = id_of(shown)
    if key_id is None:
        return None
    return Key(key_id=key_id, digest=digest_of(shown, pepper), team="", name="admin", scopes=("admin",))


def _bad(message: str, kind: FailureKind) -> FailureError:
    return FailureError(Failure(kind=kind, message=message))
