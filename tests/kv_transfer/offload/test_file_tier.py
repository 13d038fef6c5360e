"""The books of host and file tier together: reads into host memory, waits that end, disks that fail. No engine."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key

from kv_transfer.offload.block_folder import FileResult
from kv_transfer.offload.file_tier import FileTier
from kv_transfer.offload.host_tier import HostTier
from kv_transfer.tiers.cost import FadingLine, LoadJudge
from kv_transfer.tiers.file_blocks import FileBlocks
from kv_transfer.tiers.host_blocks import HostBlocks
from tests.kv_transfer.offload.test_host_tier import KEYS, found, of_request

HIT, PENDING, MISS = LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.MISS


class Rig:
    """Two ranks, four slots, and ``on_disk`` in files."""

    def __init__(self, on_disk: list[OffloadKey], slots: int = 4) -> None:
        self.now_s = 100.0
        host = HostBlocks(slots, 10)
        files = FileBlocks(1000, 10, 32)
        files.found(on_disk)
        self.steps = FadingLine()
        self.judge = LoadJudge(self.steps)
        self.book = HostTier(host, {0: 32}, with_events=True, steps=self.steps)
        self.book.files = self.tier = FileTier(files, host, self.judge, ranks=2, clock=lambda: self.now_s)

    def orders(self) -> Any:
        orders = self.tier.take_orders()
        assert orders is not None
        return orders

    def end_reads(self, fault: str = "", corrupt: bool = False) -> None:
        for order in self.orders().reads:
            for rank in (0, 1):
                wrong = fault if rank else ""
                self.book.file_ended(
                    rank, FileResult(order.key, order.slot, True, b"sum%d" % rank, fault=wrong, corrupt=corrupt)
                )

    def store(self, keys: list[OffloadKey]) -> None:
        context = of_request(self.book, keys)
        self.book.complete_store(self.book.prepare_store(keys, context).keys_to_store, context)
        self.book.on_request_finished(context)


def test_a_block_in_a_file_is_pending_then_here_with_its_checksums() -> None:
    rig = Rig(KEYS[:3])
    context = of_request(rig.book, KEYS[:4])
    assert found(rig.book, KEYS[:4], context) == [PENDING] * 3 + [MISS]
    assert rig.book.has_pending_work()
    rig.end_reads()
    assert not rig.book.has_pending_work()
    assert found(rig.book, KEYS[:4], context) == [HIT] * 3 + [MISS]
    assert rig.book.prepare_load(KEYS[:1], context).sums == [{0: b"sum0", 1: b"sum1"}]
    assert [event.keys for event in rig.book.take_events()] == [[key] for key in KEYS[:3]]
    assert rig.tier.files.status().hits == 3


@pytest.mark.parametrize("corrupt", [True, False])
def test_a_block_that_one_rank_cannot_read_is_a_miss_and_its_file_goes(corrupt: bool) -> None:
    rig = Rig(KEYS[:1])
    context = of_request(rig.book, KEYS[:1])
    assert found(rig.book, KEYS[:1], context) == [PENDING]
    rig.end_reads("it is not right", corrupt)
    assert found(rig.book, KEYS[:1], context) == [MISS]
    assert rig.orders().gone == KEYS[:1]
    assert rig.tier.files.status().corrupt == corrupt


def test_a_block_that_was_wrong_in_the_engine_is_found_in_no_tier() -> None:
    rig = Rig(KEYS[:1])
    context = of_request(rig.book, KEYS[:1])
    found(rig.book, KEYS[:1], context)
    rig.end_reads()
    load = rig.book.prepare_load(KEYS[:1], context)
    rig.book.condemn(load.block_ids.tolist())
    rig.book.complete_load(KEYS[:1], context)
    assert found(rig.book, KEYS[:1], context) == [MISS]
    assert rig.orders().gone == KEYS[:1]


def test_a_request_waits_no_longer_than_computing_takes_and_the_block_comes_in_for_the_next() -> None:
    rig = Rig(KEYS[:2])
    for _ in range(8):
        rig.steps.note(64, 0.5)
    context = of_request(rig.book, KEYS[:2])
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    other = of_request(rig.book, KEYS[:2])
    assert found(rig.book, KEYS[:1], other) == [PENDING]
    rig.now_s += 0.49
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    rig.now_s += 0.02
    assert found(rig.book, KEYS[:2], context) == [MISS] * 2
    # One that waits for another's read has a time of its own.
    assert found(rig.book, KEYS[:1], other) == [PENDING]
    rig.now_s += 2.0
    assert found(rig.book, KEYS[:1], other) == [MISS]
    rig.end_reads()
    assert found(rig.book, KEYS[:2], of_request(rig.book, KEYS[:2])) == [HIT] * 2


def test_a_read_that_takes_longer_than_computing_is_not_begun() -> None:
    rig = Rig(KEYS[:2])
    for _ in range(8):
        rig.steps.note(64, 0.001)
        rig.judge.loaded(64, 1.0)
    context = of_request(rig.book, KEYS[:2])
    assert found(rig.book, KEYS[:2], context) == [MISS] * 2
    assert rig.tier.take_orders() is None
    assert rig.tier.files.status().declined == 2


def test_a_block_of_two_requests_is_written_once_and_stays_in_its_slot_meanwhile() -> None:
    rig = Rig([], slots=2)
    rig.store(KEYS[:2])
    assert rig.tier.take_orders() is None
    rig.book.on_request_finished(of_request(rig.book, KEYS[:2]))
    orders = rig.orders()
    assert [order.key for order in orders.writes] == KEYS[:2]
    rig.book.on_request_finished(of_request(rig.book, KEYS[:2]))
    assert rig.tier.take_orders() is None
    # Its slots are taken while they are written.
    assert rig.book.prepare_store(KEYS[2:3], of_request(rig.book, KEYS[2:3])).keys_to_store == []
    for order in orders.writes:
        for rank in (0, 1):
            rig.book.file_ended(rank, FileResult(order.key, order.slot, False))
    assert rig.tier.files.status().stored == 2
    assert rig.book.prepare_store(KEYS[2:3], of_request(rig.book, KEYS[2:3])).keys_to_store == KEYS[2:3]


def test_a_disk_that_only_fails_is_left_alone_for_a_while() -> None:
    rig = Rig(KEYS, slots=16)
    more = [make_offload_key(bytes([number]) * 32, 0) for number in range(100, 104)]
    rig.tier.files.found(more)
    context = of_request(rig.book, [*KEYS, *more])
    found(rig.book, [*KEYS, *more], context)
    rig.end_reads("no answer")
    assert rig.tier.take_orders() is not None
    rig.tier.files.found(KEYS)
    assert found(rig.book, KEYS[:1], of_request(rig.book, KEYS[:1])) == [MISS]
    rig.now_s += 31
    assert found(rig.book, KEYS[:1], of_request(rig.book, KEYS[:1])) == [PENDING]


def test_an_engine_without_work_does_not_ask_a_disk_that_hangs_for_ever() -> None:
    rig = Rig(KEYS[:1])
    found(rig.book, KEYS[:1], of_request(rig.book, KEYS[:1]))
    rig.now_s += 4.9
    assert rig.book.has_pending_work()
    rig.now_s += 0.2
    assert not rig.book.has_pending_work()
    # What comes in the end is taken all the same.
    rig.end_reads()
    assert found(rig.book, KEYS[:1], of_request(rig.book, KEYS[:1])) == [HIT]


def test_after_a_reset_the_files_go_too() -> None:
    rig = Rig(KEYS[:2])
    rig.book.reset_cache()
    assert set(rig.orders().gone) == set(KEYS[:2])
    assert found(rig.book, KEYS[:1], of_request(rig.book, KEYS[:1])) == [MISS]


@pytest.mark.parametrize("fault", ["", "the disk is full"])
def test_what_is_under_way_at_a_reset_touches_nothing_of_what_comes_after(fault: str) -> None:
    rig = Rig(KEYS[:1])
    rig.store(KEYS[1:2])
    rig.book.on_request_finished(of_request(rig.book, KEYS[1:2]))
    found(rig.book, KEYS[:1], of_request(rig.book, KEYS[:1]))
    orders = rig.orders()
    rig.book.reset_cache()
    # The same blocks are being stored anew, from other weights.
    context = of_request(rig.book, KEYS[:2])
    assert found(rig.book, KEYS[:2], context) == [MISS] * 2
    assert rig.book.prepare_store(KEYS[:2], context).keys_to_store == KEYS[:2]
    for is_read, each in [(True, orders.reads[0]), (False, orders.writes[0])]:
        for rank in (0, 1):
            rig.book.file_ended(rank, FileResult(each.key, each.slot, is_read, b"old", fault=fault))
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    rig.book.complete_store(KEYS[:2], context)
    assert rig.book.prepare_load(KEYS[:2], context).sums == [{}, {}]
    assert set(rig.orders().gone) == set(KEYS[:2])
    assert not rig.book.has_pending_work()


def test_a_block_that_one_rank_could_not_write_leaves_no_part_behind() -> None:
    rig = Rig([])
    rig.store(KEYS[:1])
    rig.book.on_request_finished(of_request(rig.book, KEYS[:1]))
    (order,) = rig.orders().writes
    for rank, fault in ((0, ""), (1, "the disk is full")):
        rig.book.file_ended(rank, FileResult(order.key, order.slot, False, fault=fault))
    assert rig.orders().gone == KEYS[:1]
    assert rig.tier.files.status().blocks == 0


def test_a_request_that_takes_over_kv_reads_and_writes_no_file() -> None:
    rig = Rig(KEYS[:2])
    context = of_request(rig.book, KEYS[:2], do_remote_prefill=True)
    assert found(rig.book, KEYS[:1], context) == [MISS]
    rig.book.on_request_finished(context)
    assert rig.tier.take_orders() is None


def test_without_room_in_host_memory_a_block_is_computed() -> None:
    rig = Rig(KEYS[:2], slots=1)
    context = of_request(rig.book, KEYS[:2])
    assert isinstance(context, ReqContext)
    assert found(rig.book, KEYS[:2], context) == [PENDING, MISS]
