"""The chain of audited changes: each row carries the hash of the row before. Stores nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

FIRST = bytes(32)
"""In place of the hash before the first row."""


class AuditRow(msgspec.Struct, frozen=True, kw_only=True):
    """One change. ``detail`` says what changed, and never holds a secret or a digest of one."""

    seq: int
    at_s: float
    actor: str
    """Id of the key that asked for it."""
    action: str
    subject: str
    detail: str
    previous: bytes
    hash: bytes


def append(
    previous: AuditRow | None, *, at_s: float, actor: str, action: str, subject: str, detail: str = ""
) -> AuditRow:
    """The row behind ``previous``."""
    seq, before = (1, FIRST) if previous is None else (previous.seq + 1, previous.hash)
    row = AuditRow(
        seq=seq, at_s=at_s, actor=actor, action=action, subject=subject, detail=detail, previous=before, hash=b""
    )
    return msgspec.structs.replace(row, hash=hash_of(row))


def hash_of(row: AuditRow) -> bytes:
    """SHA-256 of the hash before and of all that the row says."""
    said = [row.seq, row.at_s, row.actor, row.action, row.subject, row.detail]
    return hashlib.sha256(row.previous + msgspec.json.encode(said)).digest()


def broken_at(rows: Iterable[AuditRow]) -> int | None:
    """The number of the first row that is not what was written there; None: all are. A cut-off end does not show."""
    seq, before = 1, FIRST
    for row in rows:
        if row.seq != seq or row.previous != before or row.hash != hash_of(row):
            return seq
        seq, before = seq + 1, row.hash
    return None
