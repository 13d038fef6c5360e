"""What is read while its request waits its turn: real books of host tier and store, and stores that are slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.kv_offload.base import OffloadKey, ReqContext, make_offload_key

from kv_transfer.offload import private
from kv_transfer.offload.scheduler import TierScheduler
from kv_transfer.stores.messages import Ended
from tests.kv_transfer.offload.test_host_tier import KEYS, found
from tests.kv_transfer.offload.test_stores_of_host_tier import HIT, MISS, PENDING, RANKS, Rig


def test_a_block_is_read_while_its_request_waits_its_turn_and_is_there_when_it_is_looked_at() -> None:
    rig = Rig(KEYS[:3], slots=16)
    context = rig.request(KEYS[:3])
    rig.book.read_ahead(KEYS[:3], context)
    # A store that takes longer than a request waits for it.
    orders = rig.orders()
    assert [(each.position, each.ahead) for each in orders.reads] == [(0, True), (1, True), (2, True)]
    rig.now_s += 10
    rig.end(orders)
    assert found(rig.book, KEYS[:3], context) == [HIT] * 3
    rig.book.answered(context, 32, 64)
    assert not rig.orders()
    # The engine had the first one by then.
    assert (rig.tier.status().ahead, rig.tier.status().ahead_unused) == (3, 1)


def test_a_request_that_is_looked_at_waits_for_what_is_read_ahead_as_for_any_read() -> None:
    rig = Rig(KEYS[:2], slots=16)
    for _ in range(8):
        rig.steps.note(64, 0.5)
    context = rig.request(KEYS[:2])
    rig.book.read_ahead(KEYS[:2], context)
    rig.now_s += 10
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    rig.now_s += 0.49
    assert found(rig.book, KEYS[:2], context) == [PENDING] * 2
    rig.now_s += 0.02
    assert found(rig.book, KEYS[:2], context) == [MISS] * 2


def test_a_request_waits_as_long_as_computing_all_takes_of_which_a_part_is_read_ahead() -> None:
    rig = Rig(KEYS[:4], slots=12)
    for _ in range(8):
        rig.steps.note(64, 0.5)
    context = rig.request(KEYS[:4])
    rig.book.read_ahead(KEYS[:4], context)
    # The last one is read when it is looked at.
    assert [each.key for each in rig.orders().reads] == KEYS[:3]
    assert found(rig.book, KEYS[:4], context) == [PENDING] * 4
    rig.now_s += 0.99
    assert found(rig.book, KEYS[:4], context) == [PENDING] * 4
    rig.now_s += 0.02
    assert found(rig.book, KEYS[:1], context) == [MISS]


def test_reads_that_go_on_when_their_request_has_ended_are_counted_and_hold_up_no_other_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kv_transfer.stores.tier._READING_MAX", 2)
    rig = Rig(KEYS[:6], slots=8)
    context = rig.request(KEYS[:2])
    rig.book.read_ahead(KEYS[:2], context)
    rig.book.on_request_finished(context)
    reading = rig.orders()
    rig.book.read_ahead(KEYS[2:4], rig.request(KEYS[2:4]))
    assert not rig.orders()
    looked_at = rig.request(KEYS[2:6])
    assert found(rig.book, KEYS[2:5], looked_at) == [PENDING, PENDING, MISS]
    rig.end(reading)
    rig.book.read_ahead(KEYS[4:6], rig.request(KEYS[4:6]))
    assert [(each.key, each.ahead) for each in rig.orders().reads] == [
        (KEYS[2], False),
        (KEYS[3], False),
        (KEYS[4], True),
        (KEYS[5], True),
    ]


def test_what_was_read_ahead_stays_while_the_engine_has_no_room_for_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(KEYS[:2], slots=8)
    context = rig.request(KEYS[:2])
    rig.book.read_ahead(KEYS[:2], context)
    rig.end_reads()
    half = scheduler_half(rig, context, monkeypatch)
    request = cast("Any", SimpleNamespace(request_id="r", kv_transfer_params=None, num_prompt_tokens=64))
    for step in range(2):
        assert half.get_num_new_matched_tokens(request, 0) == (64, True)
        # Others fill host memory meanwhile.
        rig.stored_in_host(others(step))
        assert found(rig.book, KEYS[:2], context) == [HIT] * 2
    half.update_state_after_alloc(request, cast("Any", None), 64)
    assert (rig.tier.status().ahead, rig.tier.status().ahead_unused) == (2, 0)
    rig.stored_in_host(others(2))
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [PENDING]


def scheduler_half(rig: Rig, context: ReqContext, monkeypatch: pytest.MonkeyPatch) -> TierScheduler:
    """Without stock's, which finds two blocks each time that it is asked."""
    stock = OffloadingConnectorScheduler
    monkeypatch.setattr(stock, "get_num_new_matched_tokens", lambda *_: (64, True))
    monkeypatch.setattr(stock, "update_state_after_alloc", lambda *_: None)
    monkeypatch.setattr(private, "context_of", lambda *_: context)
    half = TierScheduler.__new__(TierScheduler)
    half.manager, half._judge, half._block_tokens = rig.book, rig.judge, 32
    half._arrived, half._asked, half._held, half._loading = {}, {}, {}, {}
    return half


def others(turn: int) -> list[OffloadKey]:
    first = 100 + 20 * turn
    return [make_offload_key(bytes([number]) * 32, 0) for number in range(first, first + 20)]


def test_what_is_read_ahead_is_bounded_by_host_memory_and_stays_there_until_its_request_is_looked_at() -> None:
    rig = Rig(KEYS[:4], slots=8)
    first, second = rig.request(KEYS[:4]), rig.request(KEYS[2:4])
    rig.book.read_ahead(KEYS[:4], first)
    rig.book.read_ahead(KEYS[2:4], second)
    orders = rig.orders()
    assert [each.key for each in orders.reads] == KEYS[:2]
    rig.end(orders)
    # Others fill host memory.
    many = [make_offload_key(bytes([number]) * 32, 0) for number in range(100, 120)]
    rig.stored_in_host(many)
    assert found(rig.book, KEYS[:2], first) == [HIT] * 2
    # What was too much is read as soon as it is looked at.
    assert found(rig.book, KEYS[2:3], first) == [PENDING]
    assert [each.ahead for each in rig.orders().reads] == [False]
    rig.book.answered(first, 0, 64)
    rig.stored_in_host([make_offload_key(bytes([number]) * 32, 0) for number in range(120, 140)])
    assert found(rig.book, KEYS[:1], rig.request(KEYS[:1])) == [PENDING]


def test_a_request_that_ends_before_it_was_looked_at_leaves_room_to_read_ahead_for_others() -> None:
    rig = Rig(KEYS[:4], slots=8)
    context = rig.request(KEYS[:2])
    rig.book.read_ahead(KEYS[:2], context)
    rig.end_reads()
    rig.book.on_request_finished(context)
    assert rig.tier.status().ahead_unused == 2
    rig.book.read_ahead(KEYS[2:4], rig.request(KEYS[2:4]))
    assert len(rig.orders().reads) == 2


def test_nothing_is_read_ahead_that_does_not_pay_and_it_is_not_counted_twice() -> None:
    rig = Rig(KEYS[:2], slots=16)
    for _ in range(8):
        rig.steps.note(64, 0.001)
        rig.judge.loaded(64, 1.0)
    context = rig.request(KEYS[:2])
    rig.book.read_ahead(KEYS[:2], context)
    assert found(rig.book, KEYS[:2], context) == [MISS] * 2
    assert not rig.orders()
    assert (rig.tier.status().declined, rig.tier.status().ahead) == (2, 0)


def test_reads_ahead_that_take_long_hold_up_no_request_and_teach_what_a_thread_took() -> None:
    rig = Rig(KEYS[:3], slots=16)
    rig.book.read_ahead(KEYS[:2], rig.request(KEYS[:2]))
    ahead = rig.orders()
    rig.now_s += 2.1
    rig.orders()
    # Another one is read at once, though these have not ended for longer than a request waits.
    assert found(rig.book, KEYS[2:3], rig.request(KEYS[2:3])) == [PENDING]
    rig.now_s += 7
    for order in ahead.reads:
        for _ in range(RANKS):
            rig.book.store_ended(0, Ended(order.segment, order.key, began_s=108.0, ended_s=108.5))
    assert rig.judge.line[1] * 64 == pytest.approx(0.5)


def test_a_request_that_takes_over_kv_reads_nothing_ahead() -> None:
    rig = Rig(KEYS[:2], slots=16)
    rig.book.read_ahead(KEYS[:2], rig.request(KEYS[:2], do_remote_prefill=True))
    assert not rig.orders()
