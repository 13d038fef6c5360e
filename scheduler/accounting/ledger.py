"""The ledger: keys, usage, totals and audit in one SQLite file. One connection, one thread; decides nothing.

A commit moves totals only for records that are new, in the same transaction, so each request counts once. A key never
changes without its audit row. The scheduler that opened the ledger last may write: an older leader that stood still is
refused.
"""

from __future__ import annotations

import operator
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from accounts import audit
from accounts.audit import AuditRow
from accounts.key_table import Key
from accounts.usage import UsageRecord, work_of
from accounts.windows import WINDOWS, Calendar, Starts
from runtime.user_error import UserError

FORMAT = 2
"""Of the file: one more with each change of what it holds, of packed rows and of keys' digests too."""
BUSY_TIMEOUT_S = 5.0
_WAL_FIXED = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
"""SQLite may lose commits in WAL mode where two processes have the file open, before these."""
# Of a record, what is summed up and searched; the rest is in the packed one. Then UsageRecord.cost.
_FACTS = ("team", "key_id", "model", "estimated", "prompt_tokens", "cached_tokens", "output_tokens", "amount")
_facts = operator.attrgetter(*_FACTS)
_SUMS = ("engine_us", "prefill_us", "computed_tokens", "discarded_tokens")
_COLUMNS = ("uid", "window_s", *_FACTS, *_SUMS, "record")
_TYPES = {"team": "TEXT", "key_id": "TEXT", "model": "TEXT"}
_INSERT = f"INTO usage VALUES ({', '.join('?' * len(_COLUMNS))})"
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(UsageRecord).decode
_ADD = (
    'INSERT INTO totals VALUES (?, ?, ?, ?) ON CONFLICT ("scope", "window", start)'
    " DO UPDATE SET amount = amount + excluded.amount"
)
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys(key_id TEXT PRIMARY KEY, row BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS audit(seq INTEGER PRIMARY KEY, row BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS fronts(front_proxy_id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals("scope" TEXT, "window" TEXT, start INTEGER, amount INTEGER NOT NULL,
  PRIMARY KEY ("scope", "window", start)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS usage(uid BLOB PRIMARY KEY, window_s REAL,
  {", ".join(f"{name} {_TYPES.get(name, 'INTEGER')}" for name in (*_FACTS, *_SUMS))}, record BLOB
  ) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS usage_began ON usage(window_s);
"""


class LedgerLost(Exception):
    """Another scheduler has opened the ledger since: this one does not lead any more."""


class Ledger:
    """All methods are called from one thread. Raises sqlite3.Error where the file cannot be read or written."""

    durable = True
    """A commit is on the disk before it returns. The simulation loses no power."""

    def __init__(self, path: Path, *, timezone: str, leader_epoch: int = 0) -> None:
        """Open the file, made where it is missing, and take it over.

        Raises LedgerLost for an epoch that is over, UserError for a file that cannot be used.
        """
        self.path = path
        self.calendar = Calendar(timezone)
        self._fence = 0
        try:
            self._open()
            self._take_over(leader_epoch)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"the ledger {path} cannot be used: {error}") from error

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self.path.chmod(0o600)
        fixed = any(sqlite3.sqlite_version_info[:2] == each[:2] for each in _WAL_FIXED)
        newest = sqlite3.sqlite_version_info >= _WAL_FIXED[0]
        wal = newest or (fixed and sqlite3.sqlite_version_info >= min(_WAL_FIXED))
        mode = ("WAL" if wal else "TRUNCATE") if self.durable else "MEMORY"
        self._db.execute(f"PRAGMA journal_mode={mode}")
        self._db.execute(f"PRAGMA synchronous={'FULL' if self.durable else 'OFF'}")
        ((tables,),) = self._db.execute("SELECT count(*) FROM sqlite_schema WHERE type = 'table'")
        ((found,),) = self._db.execute("PRAGMA user_version")
        if tables and found != FORMAT:
            raise UserError(
                f"the ledger {self.path} is of another version of Baton: its format is {found}, not {FORMAT}. Move the "
                "file away, and an empty one is made; it keeps the keys too, so make those anew"
            )
        self._db.executescript(f"PRAGMA user_version = {FORMAT}; {_SCHEMA}")

    def close(self) -> None:
        """Let the file go."""
        self._db.close()

    # Keys and audit

    def keys(self) -> tuple[int, list[Key]]:
        """The version of the table, and all keys in the order in which they were made."""
        rows = self._db.execute("SELECT row FROM keys").fetchall()
        keys = [msgspec.msgpack.decode(row, type=Key) for (row,) in rows]
        return self._meta("keys_version"), sorted(keys, key=lambda key: key.created_at_s)

    def put_key(self, key: Key, *, at_s: float, actor: str, action: str, detail: str = "") -> int:
        """Write a row of the table with its audit row; the new version of the table."""
        with self._transaction():
            packed = msgspec.msgpack.encode(key)
            self._db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key.key_id, packed))
            self._append(at_s=at_s, actor=actor, action=action, subject=key.key_id, detail=detail)
            return self._set_meta("keys_version", self._meta("keys_version") + 1)

    def note(self, *, at_s: float, actor: str, action: str, subject: str, detail: str = "") -> None:
        """Write an audit row of a change that is kept elsewhere."""
        with self._transaction():
            self._append(at_s=at_s, actor=actor, action=action, subject=subject, detail=detail)

    def audit_rows(self, after: int = 0, most: int = 1000) -> list[AuditRow]:
        """The rows behind the one of this number."""
        rows = self._db.execute("SELECT row FROM audit WHERE seq > ? ORDER BY seq LIMIT ?", (after, most))
        return [msgspec.msgpack.decode(row, type=AuditRow) for (row,) in rows]

    # Front proxies

    def see_front(self, front_proxy_id: str) -> None:
        """A front proxy is there: it accepts keys and runs requests."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO fronts VALUES (?)", (front_proxy_id,))

    def forget_front(self, front_proxy_id: str) -> None:
        """It has not been there for so long that it does neither."""
        with self._transaction():
            self._db.execute("DELETE FROM fronts WHERE front_proxy_id = ?", (front_proxy_id,))

    def fronts(self) -> list[str]:
        """Those that were there."""
        return [name for (name,) in self._db.execute("SELECT front_proxy_id FROM fronts")]

    # Usage

    def book(self, records: Sequence[UsageRecord]) -> list[int]:
        """Write records; of each, how much of its amount is new. A truth replaces an estimate, nothing else."""
        try:
            with self._transaction():
                amounts = [record.amount for record in records]
                self._add(f"INSERT {_INSERT}", records, [record.window_s for record in records], amounts)
                return amounts
        except sqlite3.IntegrityError:
            # Some are told again. To look for each would cost as much as to write it, and that is seldom.
            with self._transaction():
                return self._book_again(records, self._known(records))

    def _known(self, records: Sequence[UsageRecord]) -> dict[bytes, tuple[bool, int, float]]:
        """Those that are there: whether it is an estimate, its amount and its window."""
        marks = ", ".join("?" * len(records))
        query = f"SELECT uid, estimated, amount, window_s FROM usage WHERE uid IN ({marks})"  # noqa: S608
        rows = self._db.execute(query, [record.uid for record in records])
        return {uid: (bool(estimated), amount, window_s) for uid, estimated, amount, window_s in rows}

    def _book_again(self, records: Sequence[UsageRecord], known: dict[bytes, tuple[bool, int, float]]) -> list[int]:
        booked, new, windows, amounts = [], list[UsageRecord](), list[float](), list[int]()
        for record in records:
            amount, window_s = record.amount, record.window_s
            if record.uid in known:
                estimated, former, window_s = known[record.uid]
                if not estimated or record.estimated:
                    booked.append(0)
                    continue
                amount -= former
            known[record.uid] = record.estimated, record.amount, window_s
            new.append(record)
            windows.append(window_s)
            amounts.append(amount)
            booked.append(amount)
        self._add(f"INSERT OR REPLACE {_INSERT}", new, windows, amounts)
        return booked

    def _add(
        self, insert: str, records: Sequence[UsageRecord], windows: Sequence[float], amounts: Sequence[int]
    ) -> None:
        """Write records, each with a moment of its windows, and add these amounts to the windows' totals."""
        sums: dict[tuple[str, str, Starts], int] = {}
        at = self.calendar.at
        for record, window_s, amount in zip(records, windows, amounts, strict=True):
            group = record.team, record.key_id, at(window_s)
            sums[group] = sums.get(group, 0) + amount
        self._db.executemany(insert, map(_row, records, windows))
        moved = [(*total, amount) for group, amount in sums.items() for total in totals_of(*group)]
        self._db.executemany(_ADD, moved)

    def totals(self, starts: Starts) -> dict[tuple[str, str, int], int]:
        """What was settled in the windows that began then."""
        found: dict[tuple[str, str, int], int] = {}
        for window, start_s in zip(WINDOWS, starts, strict=True):
            query = 'SELECT "scope", amount FROM totals WHERE "window" = ? AND start = ?'
            for scope, amount in self._db.execute(query, (window, start_s)):
                found[scope, window, start_s] = amount
        return found

    def latest_s(self) -> float:
        """The latest time of a record; 0: there is none."""
        (latest,) = self._db.execute("SELECT max(window_s) FROM usage").fetchone()
        return latest or 0.0

    def records(
        self, since_s: float = 0.0, after: tuple[float, bytes] | None = None, most: int = 500
    ) -> list[UsageRecord]:
        """Records from this time on, behind ``after`` (window_s and uid of the last one), the oldest first."""
        at_s, uid = after or (since_s, b"")
        query = "SELECT record FROM usage WHERE (window_s, uid) > (?, ?) ORDER BY window_s, uid LIMIT ?"
        return [_unpack(packed) for (packed,) in self._db.execute(query, (at_s, uid, most))]

    def sums(self, by: Sequence[str], since_s: float, key_id: str = "") -> list[tuple[Any, ...]]:
        """Sums of usage: the group's values, then requests and the sums of ``SUMMED``. ``key_id``: of one key alone."""
        groups = [GROUPS[each] for each in by]
        summed = ", ".join(f"sum({name})" for name in SUMMED)
        columns = ", ".join([*groups, "count(*)", summed])
        grouped = f" GROUP BY {', '.join(groups)} ORDER BY {', '.join(groups)}" if groups else ""
        where = "window_s >= ?" + (" AND key_id = ?" if key_id else "")
        values = (since_s, key_id) if key_id else (since_s,)
        return self._db.execute(f"SELECT {columns} FROM usage WHERE {where}{grouped}", values).fetchall()  # noqa: S608

    def verify(self) -> tuple[int, int, bytes, list[str]]:
        """Records and audit rows that were read, the hash of the last audit row, and what does not fit."""
        sums: dict[tuple[str, str, int], int] = {}
        count = 0
        for team, key_id, window_s, amount in self._amounts():
            count += 1
            for key in totals_of(team, key_id, self.calendar.at(window_s)):
                sums[key] = sums.get(key, 0) + amount
        kept = {
            (scope, window, start): amount for scope, window, start, amount in self._db.execute("SELECT * FROM totals")
        }
        problems = [
            f"totals of {key}: {kept.get(key, 0)} is kept, the records sum up to {sums.get(key, 0)}"
            for key in sorted(sums.keys() | kept.keys())
            if sums.get(key, 0) != kept.get(key, 0)
        ]
        rows = [row for (row,) in self._db.execute("SELECT row FROM audit ORDER BY seq")]
        chain = [msgspec.msgpack.decode(row, type=AuditRow) for row in rows]
        if (broken := audit.broken_at(chain)) is not None:
            problems.append(f"the audit chain is broken at row {broken}")
        return count, len(chain), chain[-1].hash if chain else audit.FIRST, problems

    def _amounts(self) -> Iterator[tuple[str, str, float, int]]:
        """Of every record, by time."""
        return self._db.execute("SELECT team, key_id, window_s, amount FROM usage ORDER BY window_s")

    # Transactions

    def _take_over(self, leader_epoch: int) -> None:
        with self._transaction(fenced=False):
            if leader_epoch and leader_epoch < self._meta("leader_epoch"):
                raise LedgerLost(f"{self.path}: a later leader has taken the ledger over")
            self._set_meta("leader_epoch", max(leader_epoch, self._meta("leader_epoch")))
            self._fence = self._set_meta("fence", self._meta("fence") + 1)
            zone = zlib.crc32(self.calendar.zone.encode())
            if self._meta("timezone") != zone:
                self._sum_up()
                self._set_meta("timezone", zone)
            # A front proxy that has no table says 0.
            self._set_meta("keys_version", max(1, self._meta("keys_version")))

    def _sum_up(self) -> None:
        """Make the totals of all records anew: windows begin elsewhere in another time zone."""
        self._db.execute("DELETE FROM totals")
        for team, key_id, window_s, amount in self._amounts():
            totals = totals_of(team, key_id, self.calendar.at(window_s))
            self._db.executemany(_ADD, [(*total, amount) for total in totals])

    def _transaction(self, *, fenced: bool = True) -> _Transaction:
        return _Transaction(self._db, self._check_fence if fenced else None)

    def _check_fence(self) -> None:
        if self._meta("fence") != self._fence:
            raise LedgerLost(f"{self.path}: another scheduler has taken the ledger over")

    def _meta(self, name: str) -> int:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else 0

    def _set_meta(self, name: str, value: int) -> int:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))
        return value

    def _append(self, **said: Any) -> None:
        last = self._db.execute("SELECT row FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
        previous = msgspec.msgpack.decode(last[0], type=AuditRow) if last else None
        row = audit.append(previous, **said)
        self._db.execute("INSERT INTO audit VALUES (?, ?)", (row.seq, msgspec.msgpack.encode(row)))


class _Transaction:
    """All or nothing."""

    def __init__(self, db: sqlite3.Connection, check: Any) -> None:
        self._db = db
        self._check = check

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self._check is not None:
                self._check()
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error:
                self._undo()
                raise
        else:
            self._undo()

    def _undo(self) -> None:
        # A full disk may have ended it already.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


SUMMED = ("prompt_tokens", "cached_tokens", "output_tokens", "amount", *_SUMS, "estimated")
GROUPS = {
    "team": "team",
    "model": "model",
    "key": "key_id",
    "day": "date(window_s, 'unixepoch')",
}
"""What usage may be summed by. Days are of UTC."""


def totals_of(team: str, key_id: str, starts: Starts) -> Iterable[tuple[str, str, int]]:
    """The totals that a record counts in: by scope, window and the window's start."""
    scopes = ("cluster", f"team:{team}", f"key:{key_id}") if key_id else ("cluster", f"team:{team}")
    return [(scope, window, start) for scope in scopes for window, start in zip(WINDOWS, starts, strict=True)]


def _row(record: UsageRecord, window_s: float) -> tuple[Any, ...]:
    if record.told:
        record.attempts, record.told = tuple([work_of(each) for each in record.told]), ()
    if record.window_s != window_s:
        record = msgspec.structs.replace(record, window_s=window_s)
    return (record.uid, window_s, *_facts(record), *record.cost, _pack(record))
