"""The books of host tier and store together: reads into host memory, waits that end, stores that fail. No engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key

from kv_transfer.offload.host_tier import HostTier
from kv_transfer.stores.messages import Ended, Fault, StoreOrders
from kv_transfer.stores.tier import StoreTier, Told
from kv_transfer.stores.watch import Appeared, News, StoreWatch, Unreachable, Vanished
from kv_transfer.tiers.cost import FadingLine, LoadJudge
from kv_transfer.tiers.host_blocks import HostBlocks
from kv_transfer.tiers.segment import INDEX_BYTES, NO_SCOPE, Entry
from kv_transfer.tiers.store_blocks import Segment, StoreBlocks
from tests.kv_transfer.offload.test_host_tier import KEYS, found

HIT, PENDING, MISS = LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.MISS
RANKS, BLOCK_BYTES = 2, 8
CAPACITY = 40 * (INDEX_BYTES + 8 * BLOCK_BYTES)


class Watch:
    """News that a test tells."""

    def __init__(self) -> None:
        self.news: list[News] = []

    def take(self) -> Iterator[News]:
        while self.news:
            yield self.news.pop(0)

    @property
    def has_news(self) -> bool:
        return bool(self.news)

    def close(self) -> None:
        pass


def segment(name: str, keys: list[OffloadKey], scope: str = NO_SCOPE) -> Appeared:
    sums = tuple(b"".join(b"sum%d-%03d" % (rank, key[0]) for key in keys) for rank in range(RANKS))
    entries = tuple(Entry(key, digest=b"d%d" % key[0]) for key in keys)
    return Appeared(Segment(name, scope, 100, tuple(keys), sums), entries)


class Rig:
    """Two ranks, ``slots`` slots, and ``stored`` in a store."""

    def __init__(
        self, stored: list[OffloadKey] | None = None, slots: int = 4, stores: int = 1, write_bytes_per_s: int = 0
    ) -> None:
        self.now_s = 100.0
        host = HostBlocks(slots, 10)
        self.steps = FadingLine()
        self.judge = LoadJudge(self.steps)
        self.book = HostTier(host, {0: 32}, with_events=True, steps=self.steps)
        self.watches = [Watch() for _ in range(stores)]
        if stored:
            self.watches[-1].news.append(segment("seg", stored))
        self.book.stores = [
            StoreTier(
                StoreBlocks(kind, CAPACITY, 32),
                host,
                self.judge,
                cast("StoreWatch", watch),
                ranks=RANKS,
                block_bytes=BLOCK_BYTES,
                clock=lambda: self.now_s,
                now_ms=lambda: 1,
                write_bytes_per_s=write_bytes_per_s,
            )
            for kind, watch in zip(("file", "s3")[-stores:], self.watches, strict=True)
        ]
        self.tier = self.book.stores[-1]

    def request(self, keys: list[OffloadKey], scope: str = NO_SCOPE, **params: Any) -> ReqContext:
        context = ReqContext("r", kv_transfer_params=params or None)
        for place, key in enumerate(keys):
            context.set_offload_key_position(key, 32 * (place + 1))
        self.book.on_new_request(context)
        self.book.describe(context, scope, lambda: {key: Entry(key, digest=b"d%d" % key[0]) for key in keys})
        return context

    def orders(self, *, idle: bool = True) -> StoreOrders:
        return self.tier.take_orders(idle=idle) or StoreOrders()

    def end(self, orders: StoreOrders, fault: Fault | None = None, place: int | None = None) -> None:
        """Both ranks carry these out; the second one fails."""
        ended = [Ended(each.segment, each.key) for each in orders.reads]
        for each in [*ended, *(Ended(each.segment) for each in orders.writes)]:
            for rank in range(RANKS):
                wrong = fault if rank else None
                told = Ended(each.segment, each.key, wrong, "why" if wrong else "")
                self.book.store_ended(len(self.book.stores) - 1 if place is None else place, told)

    def end_reads(self, fault: Fault | None = None) -> None:
        self.end(self.orders(), fault)

    def stored_in_host(self, keys: list[OffloadKey], scope: str = NO_SCOPE) -> None:
        context = self.request(keys, scope)
        placed = self.book.prepare_store(keys, context)
        for rank in range(RANKS):
            slots = placed.store_spec.block_ids.tolist()
            self.book.blocks.learn(rank, {slot: b"sum%05d" % slot for slot in slots})
        self.book.complete_store(placed.keys_to_store, context)
        self.book.on_request_finished(context)


def test_a_block_in_a_store_is_pending_then_here_with_the_checksums_of_its_segment() -> None:
    rig = Rig(KEYS[:3])
    context = rig.request(KEYS[:4])
    assert found(rig.book, KEYS[:4], context) == [PENDING] * 3 + [MISS]
    orders = rig.orders()
    assert [(each.segment, each.position) for each in orders.reads] == [("seg", 0), ("seg", 1), ("seg", 2)]
    rig.end(orders)
    assert found(rig.book, KEYS[:4], context) == [HIT] * 3 + [MISS]
    assert rig.book.prepare_load(KEYS[:1], context).sums == [{0: b"sum0-000", 1: b"sum1-000"}]
    assert [event.keys for event in rig.book.take_events()] == [[key] for key in KEYS[:3]]
    assert rig.tier.status().hits == 3


@pytest.mark.parametrize(
    ("fault", "removed", "kept"), [(Fault.CORRUPT, ["seg"], 0), (Fault.GONE, [], 0), (Fault.FAILED, [], 2)]
)
def test_a_block_that_one_rank_cannot_read_is_a_miss_and_damage_takes_its_segment(
    fault: Fault, removed: list[str], kept: int
) -> None:
    rig = Rig(KEYS[:2])
    context = rig.request(KEYS[:1])
    assert found(rig.book, KEYS[:1], context) == [PENDING]
    rig.end_reads(fault)
    # Asked at once again, it would be read again and again.
    rig.now_s += 3
    assert found(rig.book, KEYS[:1], context) == [MISS]
    assert rig.orders().gone == removed
    assert (rig.tier.status().blocks, rig.tier.status().corrupt) == (kept, len(removed))


def test_a_block_that_was_wrong_in_the_engine_is_found_in_no_tier() -> None:
    rig = Rig(KEYS[:1])
    context = rig.request(KEYS[:1])
    found(rig.book, KEYS[:1], context)
    rig.end_reads()
    load = rig.book.prepare_load(KEYS[:1], context)
    rig.book.condemn(load.block_ids.tolist())
    rig.book.complete_load(KEYS[:1], context)
    assert found(rig.book, KEYS[:1], context) == [MISS]
    assert rig.orders().gone == ["seg"]


def test_a_request_waits_no_longer_than_computing_takes_and_the_block_comes_in_for_the_next() -> None:
    rig = Rig(KEYS[:2])
    for _ in range(8):
        rig.steps.note(64, 0.5)
    context = rig.request(KEYS[:2])
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    rig.now_s += 0.3
    other = rig.request(KEYS[:2])
    assert found(rig.book, KEYS[:1], other) == [PENDING]
    rig.now_s += 0.19
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    rig.now_s += 0.02
    assert found(rig.book, KEYS[:2], context) == [MISS] * 2
    # One that waits for another's read has a time of its own.
    assert found(rig.book, KEYS[:1], other) == [PENDING]
    rig.now_s += 0.3
    assert found(rig.book, KEYS[:1], other) == [MISS]
    rig.end_reads()
    assert found(rig.book, KEYS[:2], rig.request(KEYS[:2])) == [HIT] * 2


def test_a_request_that_needs_two_blocks_that_another_one_reads_waits_for_all_that_is_behind_them() -> None:
    rig = Rig(KEYS[:2], slots=16)
    for _ in range(8):
        rig.steps.note(64, 0.5)
    rig.stored_in_host(KEYS[2:5])
    assert found(rig.book, KEYS[:2], rig.request(KEYS[:2])) == [PENDING] * 2
    # The last one is nowhere, and is computed in any case.
    other = rig.request(KEYS[:6])
    assert found(rig.book, KEYS[:6], other) == [PENDING] * 2 + [HIT] * 3 + [MISS]
    rig.now_s += 1.24
    assert found(rig.book, KEYS[:1], other) == [PENDING]
    rig.now_s += 0.02
    assert found(rig.book, KEYS[:1], other) == [MISS]


def test_a_read_that_takes_longer_than_computing_is_not_begun() -> None:
    rig = Rig(KEYS[:2])
    for _ in range(8):
        rig.steps.note(64, 0.001)
        rig.judge.loaded(64, 1.0)
    assert found(rig.book, KEYS[:2], rig.request(KEYS[:2])) == [MISS] * 2
    assert not rig.orders()
    assert rig.tier.status().declined == 2


def test_blocks_of_two_requests_are_written_into_one_segment_and_stay_in_their_slots_meanwhile() -> None:
    rig = Rig(slots=2)
    rig.stored_in_host(KEYS[:2])
    assert not rig.orders()
    rig.book.on_request_finished(rig.request(KEYS[:2]))
    # Others may fill the segment, unless the engine has nothing else to do, or a while later.
    assert not rig.orders(idle=False)
    rig.now_s += 6
    orders = rig.orders(idle=False)
    assert [[entry.key for entry in order.entries] for order in orders.writes] == [KEYS[:2]]
    assert rig.tier.status().blocks == 0
    rig.book.on_request_finished(rig.request(KEYS[:2]))
    assert not rig.orders()
    # Its slots are taken while they are written.
    assert rig.book.prepare_store(KEYS[2:3], rig.request(KEYS[2:3])).keys_to_store == []
    rig.end(orders)
    assert (rig.tier.status().stored, rig.tier.status().blocks) == (2, 2)
    assert rig.tier.take_told() == Told(came=orders.writes[0].entries)
    assert rig.book.prepare_store(KEYS[2:3], rig.request(KEYS[2:3])).keys_to_store == KEYS[2:3]


def test_what_no_load_would_pay_for_is_not_written() -> None:
    rig = Rig()
    for _ in range(8):
        rig.steps.note(64, 0.001)
        rig.judge.loaded(64, 1.0)
    rig.stored_in_host(KEYS[:1])
    rig.book.on_request_finished(rig.request(KEYS[:1]))
    assert not rig.orders()


def test_writes_wait_for_reads_that_a_request_waits_for_but_not_for_ever() -> None:
    rig = Rig(KEYS[:1])
    rig.stored_in_host(KEYS[1:2])
    rig.book.on_request_finished(rig.request(KEYS[1:2]))
    found(rig.book, KEYS[:1], rig.request(KEYS[:1]))
    reading = rig.orders()
    assert reading.reads and not reading.writes
    rig.now_s += 29
    assert not rig.orders().writes
    rig.end(reading)
    assert rig.orders().writes
    # A read that hangs holds up no write in the end.
    rig = Rig(KEYS[:1])
    rig.stored_in_host(KEYS[1:2])
    rig.book.on_request_finished(rig.request(KEYS[1:2]))
    found(rig.book, KEYS[:1], rig.request(KEYS[:1]))
    assert not rig.orders().writes
    rig.now_s += 31
    assert rig.orders().writes


def test_no_more_is_written_in_a_second_than_an_operator_allows() -> None:
    size = RANKS * (INDEX_BYTES + BLOCK_BYTES)
    rig = Rig(write_bytes_per_s=size // 10)
    for scope, keys in (("a", KEYS[:1]), ("b", KEYS[1:2])):
        rig.stored_in_host(keys, scope * 16)
        rig.book.on_request_finished(rig.request(keys, scope * 16))
    assert [order.scope[0] for order in rig.orders().writes] == ["a"]
    rig.now_s += 9.9
    assert not rig.orders()
    rig.now_s += 0.2
    assert [order.scope[0] for order in rig.orders().writes] == ["b"]


def test_a_block_whose_checksums_no_rank_told_is_not_written() -> None:
    rig = Rig()
    context = rig.request(KEYS[:1])
    rig.book.complete_store(rig.book.prepare_store(KEYS[:1], context).keys_to_store, context)
    for _ in range(2):
        rig.book.on_request_finished(rig.request(KEYS[:1]))
    assert not rig.orders()


def test_a_segment_holds_no_blocks_of_two_scopes() -> None:
    rig = Rig(slots=4)
    for scope, keys in (("a", KEYS[:2]), ("b", KEYS[2:4])):
        rig.stored_in_host(keys, scope * 16)
        rig.book.on_request_finished(rig.request(keys, scope * 16))
    writes = rig.orders().writes
    assert [(order.scope[0], [entry.key for entry in order.entries]) for order in writes] == [
        ("a", KEYS[:2]),
        ("b", KEYS[2:4]),
    ]


def test_what_another_worker_wrote_meanwhile_is_not_written_again() -> None:
    rig = Rig()
    rig.stored_in_host(KEYS[:2])
    rig.book.on_request_finished(rig.request(KEYS[:2]))
    rig.watches[0].news.append(segment("theirs", KEYS[:1]))
    (order,) = rig.orders().writes
    assert [entry.key for entry in order.entries] == KEYS[1:2]


def test_a_block_that_came_from_the_far_store_is_written_to_the_near_one_when_it_is_used_again() -> None:
    rig = Rig(KEYS[:1], stores=2)
    near, far = rig.book.stores
    for _ in range(2):
        context = rig.request(KEYS[:1])
        found(rig.book, KEYS[:1], context)
        if (orders := far.take_orders()) is not None:
            rig.end(orders)
        rig.book.on_request_finished(context)
    orders = near.take_orders(idle=True)
    assert orders is not None and [entry.key for entry in orders.writes[0].entries] == KEYS[:1]
    assert far.take_orders(idle=True) is None
    rig.end(orders, place=0)
    rig.book.blocks.clear()
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [PENDING]
    assert near.take_orders() is not None


def test_routing_hears_once_of_what_came_and_of_what_went() -> None:
    rig = Rig(KEYS[:2])
    assert [entry.key for entry in rig.tier.take_told().came] == KEYS[:2]
    rig.watches[0].news += [segment("again", KEYS[1:3]), Vanished("seg")]
    rig.tier.take_news()
    told = rig.tier.take_told()
    assert ([entry.key for entry in told.came], told.went) == (KEYS[2:3], KEYS[:1])
    assert not rig.tier.busy


def test_a_store_that_does_not_answer_is_shown_as_off_until_it_does() -> None:
    rig = Rig()
    rig.watches[0].news.append(Unreachable("no such bucket"))
    rig.tier.take_news()
    assert (rig.tier.status().on, rig.tier.status().why_off) == (False, "no such bucket")
    rig.watches[0].news.append(Unreachable(""))
    rig.tier.take_news()
    assert rig.tier.status().on


def test_a_store_that_only_fails_is_left_alone_for_a_while() -> None:
    rig = Rig(KEYS, slots=16)
    more = [make_offload_key(bytes([number]) * 32, 0) for number in range(100, 104)]
    rig.watches[0].news.append(segment("more", more))
    found(rig.book, [*KEYS, *more], rig.request([*KEYS, *more]))
    orders = rig.orders()
    # Blocks that were read together fail together: that is one fault.
    together = [Ended(each.segment, each.key, first=not place) for place, each in enumerate(orders.reads[:2])]
    for rank in range(RANKS):
        for each in together:
            wrong = msgspec.structs.replace(each, fault=Fault.FAILED if rank else None)
            rig.book.store_ended(0, wrong)
    assert rig.tier.status().on
    rig.end(StoreOrders(reads=orders.reads[2:]), Fault.FAILED)
    assert not rig.tier.status().on
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [MISS]
    rig.now_s += 31
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [PENDING]
    assert rig.tier.status().on


def test_nobody_waits_for_a_store_that_has_not_answered_for_longer_than_a_request_waits() -> None:
    rig = Rig(KEYS[:2])
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [PENDING]
    orders = rig.orders()
    rig.now_s += 2.1
    # The store was asked again meanwhile, as it is at each step.
    rig.orders()
    assert found(rig.book, KEYS[1:2], rig.request(KEYS[1:2])) == [MISS]
    rig.end(orders)
    assert found(rig.book, KEYS[1:2], rig.request(KEYS[1:2])) == [PENDING]


@pytest.mark.parametrize(("ended_s", "took_s"), [(100.1, 0.1), (7.0, 60.0), (1e6, 60.0)])
def test_rest_is_not_the_time_of_a_store_whose_clock_can_be_told(ended_s: float, took_s: float) -> None:
    rig = Rig(KEYS[:2])
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [PENDING]
    (order,) = rig.orders().reads
    rig.now_s += 60
    # What the store said while the engine was at rest is not heard yet.
    assert found(rig.book, KEYS[1:2], rig.request(KEYS[1:2])) == [PENDING]
    for _ in range(RANKS):
        rig.book.store_ended(0, Ended(order.segment, order.key, ended_s=ended_s))
    assert rig.judge.line[1] * 32 == pytest.approx(took_s)


def test_an_engine_without_work_writes_all_that_is_gathered() -> None:
    rig = Rig(write_bytes_per_s=RANKS * (INDEX_BYTES + BLOCK_BYTES))
    for scope, key in zip("abc", KEYS, strict=False):
        rig.stored_in_host([key], scope * 16)
        rig.book.on_request_finished(rig.request([key], scope * 16))
    written = 0
    for _ in range(3):
        # Each time that its worker asks it something.
        assert rig.book.has_pending_work()
        orders = rig.orders(idle=True)
        written += len(orders.writes)
        rig.end(orders)
        rig.tier.take_told()
        rig.now_s += 1
    assert written == 3
    assert not rig.book.has_pending_work()


def test_an_engine_without_work_asks_a_store_now_and_then_only() -> None:
    rig = Rig(KEYS[:1])
    rig.tier.take_told()
    found(rig.book, KEYS[:1], rig.request(KEYS[:1]))
    # What is to be done has to be passed on.
    assert rig.book.has_pending_work()
    orders = rig.orders()
    assert not rig.book.has_pending_work()
    rig.now_s += 0.21
    assert rig.book.has_pending_work()
    assert not rig.orders()
    assert not rig.book.has_pending_work()
    rig.end(orders)
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [HIT]


def test_what_is_gathered_is_written_when_the_engine_has_nothing_else_to_do() -> None:
    rig = Rig()
    rig.stored_in_host(KEYS[:1])
    rig.book.on_request_finished(rig.request(KEYS[:1]))
    assert rig.book.has_pending_work()
    assert rig.orders().writes
    assert not rig.book.has_pending_work()


@pytest.mark.parametrize("fault", [None, Fault.FAILED])
def test_what_is_under_way_at_a_reset_touches_nothing_of_what_comes_after(fault: Fault | None) -> None:
    rig = Rig(KEYS[:1])
    rig.stored_in_host(KEYS[1:2])
    rig.book.on_request_finished(rig.request(KEYS[1:2]))
    orders = rig.orders()
    found(rig.book, KEYS[:1], rig.request(KEYS[:1]))
    orders.reads = rig.orders().reads
    rig.book.reset_cache()
    # The same blocks are being stored anew, from other weights.
    context = rig.request(KEYS[:2])
    assert found(rig.book, KEYS[:2], context) == [MISS] * 2
    assert rig.book.prepare_store(KEYS[:2], context).keys_to_store == KEYS[:2]
    rig.end(orders, fault)
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    rig.book.complete_store(KEYS[:2], context)
    assert rig.book.prepare_load(KEYS[:2], context).sums == [{}, {}]
    assert rig.orders().gone == ["seg", orders.writes[0].segment]
    assert rig.tier.status().blocks == 0


def test_a_segment_that_one_rank_could_not_write_leaves_no_part_behind() -> None:
    rig = Rig()
    rig.stored_in_host(KEYS[:1])
    rig.book.on_request_finished(rig.request(KEYS[:1]))
    orders = rig.orders()
    rig.end(orders, Fault.FULL)
    assert rig.orders().gone == [orders.writes[0].segment]
    assert rig.tier.status().blocks == 0
    assert rig.tier.status().on


def test_a_request_that_takes_over_kv_reads_and_writes_nothing() -> None:
    rig = Rig(KEYS[:2])
    context = rig.request(KEYS[:2], do_remote_prefill=True)
    assert found(rig.book, KEYS[:1], context) == [MISS]
    rig.book.on_request_finished(context)
    assert not rig.orders()


def test_without_room_in_host_memory_a_block_is_computed() -> None:
    rig = Rig(KEYS[:2], slots=1)
    assert found(rig.book, KEYS[:2], rig.request(KEYS[:2])) == [PENDING, MISS]
