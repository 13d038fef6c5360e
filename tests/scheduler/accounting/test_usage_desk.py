"""A2 at the scheduler: a record that is told again counts once, and a full disk loses none."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from accounts.config import AccountsConfig, AccountsLimits
from accounts.key_table import Key
from accounts.rules import Budget, Limits, Price, Rules, Team
from accounts.treasury import HoldAsked
from accounts.usage import UsageRecord
from protos.accounts.v1 import accounts_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.failures import FailureKind
from scheduler.accounting import usage_desk
from scheduler.accounting.books import Books
from scheduler.accounting.usage_desk import UsageDesk
from scheduler.api.actions import ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested
from tests.support.polling import until

RULES = Rules(prices={"demo": Price(prompt=10, cached=1, output=40)})
WITHIN_S = 10.0


class Desk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: list[tuple[int, pb.FrontReply]] = []
        self.lost = asyncio.Event()
        self.placed: list[PlanRequested] = []
        self.answers: list[ReplyWaiting | ReplyRefusal] = []

    async def start(
        self, mode: Literal["count", "enforce"] = "count", rules: Rules = RULES, commit_interval_s: float = 0.01
    ) -> UsageDesk:
        self.books = Books(self.path)
        await self.books.open(0)
        self.desk = UsageDesk(
            AccountsConfig(mode=mode, slice_tokens=8),
            rules,
            self.books,
            lambda session, reply: self.replies.append((session, reply)),
            place=self.placed.append,
            answer=self.answers.append,
            lost=self.lost,
            limits=AccountsLimits(commit_interval_s=commit_interval_s),
        )
        await self.desk.open()
        self.desk.use_keys({"k1": Key(key_id="k1", digest=b"", team="a")})
        for session in (4, 5, 6):
            self.desk.joined(session, f"front-{session}")
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
    return msgspec.msgpack.encode([msgspec.structs.replace(record, **facts)])


AMOUNT = 2 * 10 + 1 + 2 * 40


async def test_a_record_is_priced_written_and_acknowledged(made: Desk) -> None:
    made.desk.records(4, packed(1))
    await until(lambda: made.booked, within_s=WITHIN_S)
    assert made.booked == [(4, (1).to_bytes(16, "big"))]
    (record,) = await made.books.call(lambda ledger: ledger.records())
    assert record.amount == AMOUNT == made.settled()


async def test_records_are_written_when_one_asks_for_them_or_a_front_proxy_leaves(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "ledger.sqlite")
    usage = await desk.start(commit_interval_s=3_600.0)
    usage.records(4, packed(1))
    assert not desk.booked
    await usage.write()
    assert desk.booked == [(4, (1).to_bytes(16, "big"))]
    await usage.write()
    usage.records(4, packed(2))
    usage.told(4, msgspec.msgpack.encode([]))
    await until(lambda: len(desk.booked) == 2, within_s=WITHIN_S)
    await usage.close()
    await desk.books.close()


async def test_a_record_that_cannot_be_read_is_set_aside_alone_and_settled_as_it_was_held(made: Desk) -> None:
    good, bad, unheld = (msgspec.msgpack.decode(packed(number))[0] for number in (1, 2, 3))
    bad[7] = unheld[7] = -1
    asked = HoldAsked(
        uid=bad[0], part=0, key_id="", team="a", model="demo", priority_class="default", prompt_tokens=3,
        output_tokens_max=2,
    )  # fmt: skip
    made.desk.ask(PlanRequested(session=4, plan_id=1, request_id="r", prompt_tokens=3, output_tokens_max=2, hold=asked))
    assert made.desk.records(4, msgspec.msgpack.encode([bad, unheld, "no record", good])) == 3
    await until(lambda: len(made.booked) == 3, within_s=WITHIN_S)
    assert {uid for _, uid in made.booked} == {good[0], bad[0], unheld[0]}
    records = await made.books.call(lambda ledger: ledger.records())
    assert sorted((record.uid, record.estimated) for record in records) == [(good[0], False), (bad[0], True)]
    assert made.desk.treasury.holds == 0
    made.desk.treasury.check()
    assert made.desk.records(4, b"\xc1") == 1


async def test_a_record_that_is_told_again_counts_once_also_for_the_next_leader(made: Desk) -> None:
    for _ in range(3):
        made.desk.records(4, packed(1))
    made.desk.records(5, packed(1))
    await until(lambda: len(made.booked) == 4, within_s=WITHIN_S)
    assert made.settled() == AMOUNT
    await made.desk.close()
    await made.books.close()
    await made.start()
    assert made.settled() == AMOUNT
    made.desk.records(6, packed(1))
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
    made.desk.records(4, packed(1))
    await until(lambda: made.desk.treasury.ledger_away, within_s=WITHIN_S)
    assert not made.booked
    ledger.book = book
    made.desk.records(4, packed(2))
    await until(lambda: len(made.booked) == 2, within_s=WITHIN_S)
    assert not made.desk.treasury.ledger_away and made.settled() == 2 * AMOUNT


async def test_a_scheduler_whose_ledger_was_taken_over_ends(made: Desk) -> None:
    other = Books(made.path)
    await other.open(0)
    made.desk.records(4, packed(1))
    await asyncio.wait_for(made.lost.wait(), WITHIN_S)
    assert not made.booked
    await other.close()


def question(number: int, session: int = 4, **facts: Any) -> PlanRequested:
    hold = HoldAsked(
        uid=number.to_bytes(16, "big"),
        part=0,
        key_id="k1",
        team="a",
        model="demo",
        priority_class=facts.pop("priority_class", "default"),
        prompt_tokens=3,
        output_tokens_max=20,
    )
    return PlanRequested(
        session=session, plan_id=number, request_id=f"r{number}", prompt_tokens=3, output_tokens_max=20, hold=hold
    )


def limited(**limits: Any) -> Rules:
    return msgspec.structs.replace(RULES, teams={"a": Team(limits=Limits(**limits))})


async def enforcing(made: Desk, rules: Rules) -> UsageDesk:
    await made.desk.close()
    await made.books.close()
    return await made.start("enforce", rules)


async def test_what_holds_is_placed_and_the_plan_says_how_much(made: Desk) -> None:
    desk = await enforcing(made, RULES)
    asked = question(1)
    desk.ask(asked)
    assert made.placed == [asked] and asked.hold is not None
    plan = pb.Plan()
    desk.tell_grant(asked.hold, plan)
    assert plan.granted_tokens == 8 and not plan.rates


async def test_a_spent_budget_is_told_in_words_that_a_client_does_not_try_again(made: Desk) -> None:
    desk = await enforcing(made, limited(budgets=(Budget(amount=400, window="total"),)))
    desk.ask(question(1))
    desk.ask(question(2))
    (refused,) = made.answers
    assert isinstance(refused, ReplyRefusal) and len(made.placed) == 1
    failure = refused.failure
    assert (failure.kind, failure.code, refused.cause) == (
        FailureKind.EXHAUSTED,
        "insufficient_quota",
        "account_budget",
    )
    assert "Team a has used its budget" in failure.message


async def test_a_rate_refuses_with_its_time_and_batch_waits_for_it(made: Desk) -> None:
    desk = await enforcing(made, limited(requests_per_minute=6000, concurrent_requests=1))
    desk.ask(question(1))
    desk.ask(question(2))
    desk.ask(question(3, priority_class="batch"))
    refused, waits = made.answers
    assert isinstance(refused, ReplyRefusal) and refused.failure.code == "rate_limit_exceeded"
    assert refused.standing is not None and refused.standing.requests is not None
    assert isinstance(waits, ReplyWaiting) and [each.plan_id for each in made.placed] == [1]
    desk.records(4, packed(1, key_id="k1"))
    assert [each.plan_id for each in made.placed] == [1, 3]


async def test_a_question_that_is_taken_back_waits_no_more(made: Desk) -> None:
    desk = await enforcing(made, limited(concurrent_requests=1))
    desk.ask(question(1))
    desk.ask(question(2, priority_class="batch"))
    desk.ended(4, 2)
    desk.records(4, packed(1, key_id="k1"))
    assert [each.plan_id for each in made.placed] == [1]


async def test_an_extension_is_answered_and_one_of_a_stranger_is_not(made: Desk) -> None:
    desk = await enforcing(made, limited(budgets=(Budget(amount=30 + 16 * 40, window="total"),)))
    desk.ask(question(1))
    uid = (1).to_bytes(16, "big")
    for beyond, granted in ((8, 16), (16, 16)):
        desk.extend(4, accounts_pb2.ExtendHold(uid=uid, part=0, beyond_tokens=beyond))
        assert made.replies[-1][1].extended.output_tokens == granted
    desk.extend(4, accounts_pb2.ExtendHold(uid=b"x", part=0, beyond_tokens=8))
    assert len(made.replies) == 2


async def test_holds_of_a_front_proxy_that_died_are_written_as_they_are(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = await enforcing(made, RULES)
    desk.ask(question(1))
    desk.left(4)
    desk.joined(7, "front-4")
    desk.told(7, msgspec.msgpack.encode([]))
    await until(lambda: made.settled() == 30 + 8 * 40, within_s=WITHIN_S)
    await desk.close()
    (record,) = await made.books.call(lambda ledger: ledger.records())
    assert record.estimated and record.outcome == "unknown" and record.output_tokens == 8
