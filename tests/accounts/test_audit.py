"""A change of an audited row, and a row that is missing, show."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from accounts.audit import AuditRow, append, broken_at


def chain(length: int) -> list[AuditRow]:
    rows: list[AuditRow] = []
    for number in range(length):
        last = rows[-1] if rows else None
        rows.append(append(last, at_s=float(number), actor="admin", action="key.create", subject=f"k{number}"))
    return rows


def test_a_whole_chain_holds() -> None:
    assert broken_at(chain(5)) is None


@given(st.integers(0, 4), st.sampled_from(["at_s", "actor", "action", "subject", "detail"]))
def test_a_changed_row_shows(at: int, field: str) -> None:
    rows = chain(5)
    rows[at] = msgspec.structs.replace(rows[at], **{field: 9.5 if field == "at_s" else "other"})
    assert broken_at(rows) == at + 1


@given(st.integers(0, 3))
def test_a_missing_row_shows(at: int) -> None:
    rows = chain(5)
    del rows[at]
    assert broken_at(rows) == at + 1
