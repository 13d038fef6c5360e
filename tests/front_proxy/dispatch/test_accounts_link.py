"""Usage records travel with other messages, before them; none is told twice on one stream, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from accounts.config import AccountsConfig, AccountsLimits
from accounts.key_table import Key
from accounts.usage import UsageRecord
from front_proxy.dispatch.accounts_link import RECORDS_SENT_MAX, AccountsLink
from front_proxy.dispatch.metrics import MESSAGES_UNREAD
from front_proxy.planning.key_watch import KeyWatch
from front_proxy.request.bill import Bill
from protos.accounts.v1 import accounts_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from tests.support.polling import until

NEVER_S = 60.0


class Stream:
    """What a link said, message by message: the uids of records, or the kind of another message."""

    def __init__(self, tell_within_s: float = NEVER_S, keys: KeyWatch | None = None) -> None:
        self.said: list[list[int] | str] = []
        self.alive = True
        limits = AccountsLimits(tell_within_s=tell_within_s)
        self.link = AccountsLink(keys, AccountsConfig(mode="enforce"), limits)
        self.link.send = self._send
        self.link.begin()
        self.said.clear()

    def hear(self, **said: Any) -> None:
        reply = pb.FrontReply(**said)
        self.link.hear(reply.WhichOneof("message"), reply)

    def _send(self, updates: pb.FrontUpdates) -> bool:
        for message in updates.messages if self.alive else ():
            kind = message.WhichOneof("message") or ""
            records = msgspec.msgpack.decode(message.records, type=list[UsageRecord]) if kind == "records" else []
            self.said.append([int.from_bytes(record.uid, "big") for record in records] if records else kind)
        return self.alive


def record(number: int) -> UsageRecord:
    return Bill(number.to_bytes(16, "big"), key_id="k", team="t", model="m", api="", wall_s=0.0).record(
        answered=True, failed=False, ttft_s=0.0, wall_s=1.0
    )


async def test_records_go_together_before_the_next_message() -> None:
    stream = Stream()
    for number in range(3):
        stream.link.record(record(number))
    assert stream.said == []
    stream.link.flush()
    stream.link.flush()
    assert stream.said == [[0, 1, 2]]


async def test_records_ride_on_a_question_and_leave_it_with_the_stream_that_is_lost() -> None:
    stream, question = Stream(), pb.PlanRequest(plan_id=1)
    for number in range(RECORDS_SENT_MAX + 2):
        stream.link.record(record(number))
    stream.link.tell_with(question)
    assert [len(each) for each in stream.said] == [RECORDS_SENT_MAX, 2] and not question.records
    stream.link.record(record(500))
    stream.link.tell_with(question)
    assert len(msgspec.msgpack.decode(question.records)) == 1 and len(stream.said) == 2
    stream.link.flush()
    assert len(stream.said) == 2
    stream.link.lost()
    stream.link.begin()
    stream.link.tell_with(question)
    assert question.records == b"", "they were told when the stream began"


async def test_what_a_scheduler_says_that_cannot_be_read_is_counted_and_changes_nothing() -> None:
    watch = KeyWatch(pepper=b"", max_age_s=NEVER_S)
    stream = Stream(keys=watch)
    keys = msgspec.msgpack.encode([Key(key_id="k1", digest=b"d", team="a")])
    stream.hear(keys=accounts_pb2.KeyTable(version=3, number=1, keys=keys))
    table, good_until_s = watch.table, watch.good_until_s
    assert table.version == 3 and stream.link.knows_keys
    stream.said.clear()
    stream.link._ask_keys(watch)
    for bad in (b"\xc1", msgspec.msgpack.encode([{"key_id": 1}])):
        stream.hear(keys=accounts_pb2.KeyTable(version=4, number=3, keys=bad))
    assert watch.table is table and watch.good_until_s == good_until_s
    assert len(stream.said) == 1, "it asks again when its time has come"
    part = Bill(bytes(16), key_id="k", team="t", model="m", api="", wall_s=0.0).part(3)
    part.most = 8
    stream.link.asked(1, part)
    stream.hear(plan=pb.Plan(plan_id=1, granted_tokens=8, rates=b"\xc1"))
    assert part.granted == 8 and part.bill.standing is None
    counted = [MESSAGES_UNREAD.labels(kind)._value.get() for kind in ("keys", "plan")]
    assert counted == [2, 1]


async def test_a_record_that_no_message_follows_is_told_after_a_moment() -> None:
    stream = Stream(tell_within_s=0.001)
    stream.link.record(record(7))
    await until(lambda: stream.said == [[7]], within_s=10.0)
    stream.link.record(record(8))
    await until(lambda: stream.said == [[7], [8]], within_s=10.0)


async def test_what_frees_something_is_told_before_what_asks_for_more() -> None:
    for ask in (_extend, AccountsLink.grant_away):
        stream = Stream()
        part = Bill(bytes(16), key_id="k", team="t", model="m", api="", wall_s=0.0).part(3)
        part.most = 1_000
        stream.link.record(record(1))
        ask(stream.link, part)
        assert stream.said[0] == [1] and len(stream.said) == 2


_extend: Callable[..., object] = AccountsLink.extend


async def test_after_a_lost_stream_all_that_is_not_booked_is_told_once() -> None:
    stream = Stream()
    stream.link.record(record(1))
    stream.link.flush()
    stream.link.record(record(2))
    stream.link.lost()
    stream.link.record(record(3))
    stream.said.clear()
    stream.link.begin()
    assert stream.said == [[1, 2, 3], "holds"]
    stream.link.flush()
    assert len(stream.said) == 2
    booked = accounts_pb2.UsageBooked(uids=[number.to_bytes(16, "big") for number in (1, 2, 3)])
    stream.hear(booked=booked)
    assert stream.link.unbooked == 0


async def test_who_leaves_waits_for_what_a_scheduler_can_still_book() -> None:
    stream = Stream()
    await stream.link.booked(NEVER_S)
    stream.link.record(record(1))
    leaving = asyncio.create_task(stream.link.booked(NEVER_S))
    await until(lambda: stream.said == [[1], "holds"], within_s=10.0)
    assert not leaving.done()
    stream.hear(booked=accounts_pb2.UsageBooked(uids=[(1).to_bytes(16, "big")]))
    await leaving
    stream.link.record(record(2))
    stream.link.lost()
    await stream.link.booked(NEVER_S)


async def test_many_records_are_told_piece_by_piece() -> None:
    stream = Stream()
    stream.link.lost()
    for number in range(RECORDS_SENT_MAX + 1):
        stream.link.record(record(number))
    stream.link.begin()
    assert [len(each) for each in stream.said if isinstance(each, list)] == [RECORDS_SENT_MAX, 1]


async def test_a_record_whose_message_did_not_go_is_told_again() -> None:
    stream = Stream()
    stream.link.record(record(1))
    stream.alive = False
    stream.link.flush()
    stream.link.record(record(2))
    stream.alive = True
    stream.link.begin()
    assert stream.said[0] == [1, 2]
