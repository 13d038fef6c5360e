"""A2 at the scheduler: a record that is told again counts once, and a full disk loses none."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from accounts.config import AccountsConfig, AccountsLimits
from accounts.rules import Price, Rules
from accounts.usage import UsageRecord
from protos.scheduler.v1 import scheduler_pb2 as pb
from scheduler.accounting import usage_desk
from scheduler.accounting.books import Books
from scheduler.accounting.usage_desk import UsageDesk
from tests.support.polling import until

RULES = Rules(prices={"demo": Price(prompt=10, cached=1, output=40)})
WITHIN_S = 10.0


class Desk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: list[tuple[int, pb.FrontReply]] = []
        self.lost = asyncio.Event()

    async def start(self) -> UsageDesk:
        self.books = Books(self.path)
        await self.books.open(0)
        self.desk = UsageDesk(
            AccountsConfig(mode="count"),
            RULES,
            self.books,
            lambda session, reply: self.replies.append((session, reply)),
            lost=self.lost,
            limits=AccountsLimits(commit_interval_s=0.01),
        )
        await self.desk.open()
        return self.desk

    @property
    def booked(self) -> list[tuple[int, bytes]]:
        return [(session, uid) for session, reply in self.replies for uid in reply.booked.uids]

    def settled(self) -> int:
        account = self.desk.treasury.account("team:a", 0.0, self.books.wall_s())
        assert account.spents[0].late == 0
        return account.spents[0].settled


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path / "ledger.sqlite")
    await desk.start()
    yield desk
    await desk.desk.close()
    await desk.books.close()


def packed(number: int, **facts: Any) -> bytes:
    record = UsageRecord(
        uid=number.to_bytes(16, "big"),
        key_id="",
        team="a",
        model="demo",
        api="",
        priority_class="default",
        outcome="finished",
        prompt_tokens=3,
        cached_tokens=1,
        output_tokens=2,
    )
    return msgspec.msgpack.encode(msgspec.structs.replace(record, **facts))


AMOUNT = 2 * 10 + 1 + 2 * 40


async def test_a_record_is_priced_written_and_acknowledged(made: Desk) -> None:
    made.desk.usage(4, packed(1))
    await until(lambda: made.booked, within_s=WITHIN_S)
    assert made.booked == [(4, (1).to_bytes(16, "big"))]
    (record,) = await made.books.call(lambda ledger: ledger.records())
    assert record.amount == AMOUNT == made.settled()


async def test_a_record_that_is_told_again_counts_once_also_for_the_next_leader(made: Desk) -> None:
    for _ in range(3):
        made.desk.usage(4, packed(1))
    made.desk.usage(5, packed(1))
    await until(lambda: len(made.booked) == 4, within_s=WITHIN_S)
    assert made.settled() == AMOUNT
    await made.desk.close()
    await made.books.close()
    await made.start()
    assert made.settled() == AMOUNT
    made.desk.usage(6, packed(1))
    await until(lambda: len(made.booked) == 5, within_s=WITHIN_S)
    assert made.settled() == AMOUNT
    assert (await made.books.call(lambda ledger: ledger.verify()))[3] == []


async def test_while_the_disk_is_full_records_wait_and_it_is_known(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_desk, "RETRY_S", 0.01)
    ledger: Any = made.books._ledger
    book = ledger.book

    def full(_records: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    ledger.book = full
    made.desk.usage(4, packed(1))
    await until(lambda: made.desk.treasury.ledger_away, within_s=WITHIN_S)
    assert not made.booked
    ledger.book = book
    made.desk.usage(4, packed(2))
    await until(lambda: len(made.booked) == 2, within_s=WITHIN_S)
    assert not made.desk.treasury.ledger_away and made.settled() == 2 * AMOUNT


async def test_a_scheduler_whose_ledger_was_taken_over_ends(made: Desk) -> None:
    other = Books(made.path)
    await other.open(0)
    made.desk.usage(4, packed(1))
    await asyncio.wait_for(made.lost.wait(), WITHIN_S)
    assert not made.booked
    await other.close()
