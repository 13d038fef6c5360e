"""The book of the host tier as vLLM's scheduler half asks it. No engine."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key

from kv_transfer.offload.host_tier import HostTier
from kv_transfer.tiers.cost import FadingLine
from kv_transfer.tiers.host_blocks import HostBlocks

KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(6)]


def tier(slots: int = 4, *, with_events: bool = True) -> HostTier:
    return HostTier(HostBlocks(slots, 10), {0: 32}, with_events=with_events, steps=FadingLine())


def of_request(tier: HostTier, keys: list[OffloadKey], **params: Any) -> ReqContext:
    context = ReqContext("r", kv_transfer_params=params or None)
    for place, key in enumerate(keys):
        context.set_offload_key_position(key, 32 * (place + 1))
    tier.on_new_request(context)
    return context


def stored(tier: HostTier, keys: list[OffloadKey]) -> None:
    context = of_request(tier, keys)
    tier.complete_store(tier.prepare_store(keys, context).keys_to_store, context)
    tier.on_request_finished(context)


def found(tier: HostTier, keys: list[OffloadKey], context: ReqContext) -> list[LookupResult]:
    return [tier.lookup(key, context) for key in keys]


def test_a_block_is_pending_then_here_and_goes_with_an_event() -> None:
    book = tier()
    first = of_request(book, KEYS[:2])
    output = book.prepare_store(KEYS[:2], first)
    assert output.keys_to_store == KEYS[:2]
    assert found(book, KEYS[:3], first) == [LookupResult.HIT_PENDING, LookupResult.HIT_PENDING, LookupResult.MISS]
    book.complete_store(KEYS[:2], first)
    assert found(book, KEYS[:2], first) == [LookupResult.HIT] * 2
    stored(book, KEYS[2:6])
    told = [(event.removed, event.medium.value, event.keys) for event in book.take_events()]
    assert told == [
        (False, "CPU", KEYS[:2]),
        (True, "CPU", [KEYS[1], KEYS[0]]),
        (False, "CPU", KEYS[2:6]),
    ]
    assert list(book.take_events()) == []


def test_without_listeners_no_events_pile_up() -> None:
    book = tier(with_events=False)
    stored(book, KEYS[:2])
    assert list(book.take_events()) == []


def test_a_request_that_takes_over_kv_neither_loads_nor_stores() -> None:
    book = tier()
    stored(book, KEYS[:2])
    context = of_request(book, KEYS[:4], do_remote_prefill=True)
    assert found(book, KEYS[:1], context) == [LookupResult.MISS]
    assert book.prepare_store(KEYS[2:4], context).keys_to_store == []
    # The pull failed, and its connector asks for no second one.
    assert context.kv_transfer_params is not None
    context.kv_transfer_params["do_remote_prefill"] = False
    assert found(book, KEYS[:1], context) == [LookupResult.HIT]


def test_a_load_has_the_checksums_of_what_was_stored() -> None:
    book = tier()
    context = of_request(book, KEYS[:2])
    slots = book.prepare_store(KEYS[:2], context).store_spec.block_ids.tolist()
    book.blocks.learn(0, {slots[0]: b"first", slots[1]: b"second"})
    book.complete_store(KEYS[:2], context)
    load = book.prepare_load(KEYS[:2], context)
    assert (load.block_ids.tolist(), load.sums) == (slots, [{0: b"first"}, {0: b"second"}])


def test_a_request_keeps_what_it_had_in_the_engines_memory_too() -> None:
    book = tier()
    stored(book, KEYS[:2])
    stored(book, KEYS[2:4])
    # Its prompt was in the engine's own memory: it neither looks up nor stores.
    book.on_request_finished(of_request(book, KEYS[:2]))
    stored(book, KEYS[4:6])
    assert found(book, KEYS[:4], of_request(book, KEYS[:4])) == [LookupResult.HIT] * 2 + [LookupResult.MISS] * 2


def test_after_a_reset_nothing_is_here() -> None:
    book = tier()
    stored(book, KEYS[:4])
    book.reset_cache()
    assert found(book, KEYS[:1], of_request(book, KEYS[:1])) == [LookupResult.MISS]
