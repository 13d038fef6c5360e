"""What is written counts once, by one writer, and what was changed shows."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accounts.key_table import Key
from accounts.usage import AttemptWork, UsageRecord
from runtime.user_error import UserError
from scheduler.accounting.ledger import Ledger, LedgerLost

DAY_S = 86_400.0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite", timezone="UTC")
    yield opened
    opened.close()


def record(number: int, **facts: object) -> UsageRecord:
    one = UsageRecord(
        uid=number.to_bytes(16, "big"),
        key_id="k1",
        team="a",
        model="demo",
        api="/v1/completions",
        priority_class="default",
        outcome="finished",
        prompt_tokens=10,
        cached_tokens=4,
        output_tokens=5,
        amount=100,
        window_s=DAY_S,
        attempts=(AttemptWork(worker_id="w", stage="decode", computed_tokens=6, decoded_tokens=7, decode_us=30),),
    )
    return msgspec.structs.replace(one, **facts)


def test_a_record_is_read_as_it_was_written(ledger: Ledger) -> None:
    ledger.book([record(1), record(2, estimated=True, attempts=())])
    assert ledger.records() == [record(1), record(2, estimated=True, attempts=())]
    assert ledger.records(after=(DAY_S, record(1).uid)) == [record(2, estimated=True, attempts=())]
    assert ledger.records(since_s=DAY_S + 1) == []


def test_a_truth_replaces_an_estimate_once_and_never_the_reverse(ledger: Ledger) -> None:
    estimate = record(1, estimated=True, amount=300)
    assert ledger.book([estimate]) == [300]
    assert ledger.book([estimate, record(1, window_s=9 * DAY_S), record(1)]) == [0, -200, 0]
    assert ledger.book([estimate]) == [0]
    assert ledger.records() == [record(1)], "in the windows of its estimate"
    assert ledger.verify()[3] == []


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 99)), max_size=30), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_totals_are_the_sums_of_records_whatever_is_told_again(
    tmp_path: Path, told: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    path = tmp_path / "again.sqlite"
    path.unlink(missing_ok=True)
    ledger = Ledger(path, timezone="UTC")
    booked = 0
    while told:
        size = data.draw(st.integers(1, len(told)))
        batch, told = told[:size], told[size:]
        booked += sum(ledger.book([record(number, estimated=guess, amount=n) for number, guess, n in batch]))
    count, _, _, problems = ledger.verify()
    assert problems == [] and count == len(ledger.records())
    assert sum(each.amount for each in ledger.records()) == booked
    starts = ledger.calendar.at(DAY_S)
    assert ledger.totals(starts).get(("team:a", "day", int(DAY_S)), 0) == booked
    ledger.close()


def test_who_opens_it_last_may_write(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.sqlite", timezone="UTC", leader_epoch=3)
    second = Ledger(tmp_path / "ledger.sqlite", timezone="UTC", leader_epoch=4)
    for write in (lambda: first.book([record(1)]), lambda: first.put_key(key(), at_s=1.0, actor="a", action="b")):
        with pytest.raises(LedgerLost, match="another scheduler"):
            write()
    assert second.book([record(1)]) == [100]
    with pytest.raises(LedgerLost, match="later leader"):
        Ledger(tmp_path / "ledger.sqlite", timezone="UTC", leader_epoch=3)


@pytest.mark.parametrize(
    ("content", "why"),
    [("CREATE TABLE usage(uid BLOB PRIMARY KEY, attempts BLOB)", "another version"), (None, "not a database")],
)
def test_a_file_that_cannot_be_used_is_refused_with_a_sentence(tmp_path: Path, content: str | None, why: str) -> None:
    path = tmp_path / "ledger.sqlite"
    if content is None:
        path.write_bytes(b"no ledger at all" * 100)
    else:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute(content)
    with pytest.raises(UserError, match=why) as refused:
        Ledger(path, timezone="UTC")
    assert str(path) in str(refused.value)


def key() -> Key:
    return Key(key_id="k1", digest=b"d" * 32, team="a")


def test_a_key_changes_with_its_audit_row_or_not_at_all(ledger: Ledger) -> None:
    assert ledger.keys() == (1, [])
    assert ledger.put_key(key(), at_s=1.0, actor="admin", action="key.create") == 2
    assert ledger.keys() == (2, [key()])
    assert [(row.action, row.subject, row.actor) for row in ledger.audit_rows()] == [("key.create", "k1", "admin")]
    ledger._db.execute("DROP TABLE audit")
    with pytest.raises(sqlite3.Error):
        ledger.put_key(msgspec.structs.replace(key(), revoked=True), at_s=2.0, actor="admin", action="key.revoke")
    assert ledger.keys() == (2, [key()])


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        ("UPDATE usage SET amount = amount - 1", "the records sum up to"),
        ("DELETE FROM totals WHERE \"window\" = 'month'", "0 is kept"),
        ("DELETE FROM audit WHERE seq = 1", "broken at row 1"),
    ],
)
def test_what_was_changed_by_hand_shows(ledger: Ledger, tamper: str, problem: str) -> None:
    ledger.book([record(1)])
    ledger.put_key(key(), at_s=1.0, actor="admin", action="key.create")
    ledger.put_key(key(), at_s=2.0, actor="admin", action="key.rotate")
    assert ledger.verify()[3] == []
    ledger._db.execute(tamper)
    assert problem in " ".join(ledger.verify()[3])


def test_usage_is_summed_by_what_is_asked(ledger: Ledger) -> None:
    ledger.book([record(1), record(2, team="b", window_s=2 * DAY_S), record(3, window_s=2 * DAY_S)])
    assert [row[:4] for row in ledger.sums(["team", "day"], 0.0)] == [
        ("a", "1970-01-02", 1, 10),
        ("a", "1970-01-03", 1, 10),
        ("b", "1970-01-03", 1, 10),
    ]
    (whole,) = ledger.sums([], 0.0)
    assert whole == (3, 30, 12, 15, 300, 90, 0, 18, 6, 0)
    assert ledger.sums([], 0.0, key_id="other")[0][0] == 0
