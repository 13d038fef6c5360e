"""Blocks in host memory: written before they are read, one slot each, and never again when found wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.tiers.host_blocks import Found, HostBlocks, Placed, Wanted, slots_in

SLOTS = 4


def wanted(*keys: bytes) -> list[Wanted]:
    return [Wanted(key, 32, 32 * (place + 1)) for place, key in enumerate(keys)]


def nothing(_: bytes) -> bool:
    return False


def holding(*keys: bytes) -> HostBlocks:
    blocks = HostBlocks(SLOTS, 10)
    placed = blocks.place(wanted(*keys), nothing)
    blocks.learn(0, {slot: key for key, slot in zip(placed.keys, placed.slots, strict=True)})
    blocks.written(placed.keys)
    return blocks


def test_a_block_is_found_when_every_rank_has_written_it() -> None:
    blocks = HostBlocks(SLOTS, 10)
    assert blocks.find(b"a") is Found.MISSING
    placed = blocks.place(wanted(b"a"), nothing)
    assert blocks.find(b"a") is Found.PENDING
    blocks.learn(1, {placed.slots[0]: b"sum"})
    assert blocks.written([b"a"]) == [b"a"]
    assert blocks.find(b"a") is Found.READY
    assert blocks.read([b"a"]) == [(placed.slots[0], {1: b"sum"})]


def test_what_could_not_be_written_is_not_there() -> None:
    blocks = HostBlocks(SLOTS, 10)
    blocks.place(wanted(b"a"), nothing)
    blocks.not_written([b"a"])
    assert blocks.find(b"a") is Found.MISSING
    assert blocks.status().blocks == blocks.status().stored == 0


def test_a_prompt_that_does_not_fit_is_stored_from_its_beginning() -> None:
    blocks = HostBlocks(SLOTS, 10)
    assert blocks.place(wanted(b"a", b"b", b"c", b"d", b"e"), nothing).keys == [b"a", b"b", b"c", b"d"]


def test_a_prompt_does_not_push_out_its_own_beginning() -> None:
    blocks = holding(b"a", b"b", b"x", b"y")
    placed = blocks.place(wanted(b"c", b"d", b"e"), lambda key: key in (b"a", b"b"))
    assert placed == Placed(keys=[b"c", b"d"], slots=placed.slots, evicted=[b"y", b"x"])
    assert blocks.find(b"a") is blocks.find(b"b") is Found.READY


def test_a_condemned_block_is_found_by_no_one_and_its_slot_is_free_after_the_last_reader() -> None:
    blocks = holding(b"a", b"b", b"c", b"d")
    ((slot, _),) = blocks.read([b"a"])
    blocks.read([b"a"])
    blocks.condemn([slot])
    blocks.condemn([slot])
    assert blocks.find(b"a") is Found.MISSING
    assert blocks.place(wanted(b"a"), nothing).keys == []
    assert blocks.read_done([b"a"]) == []
    assert blocks.read_done([b"a"]) == [b"a"]
    assert blocks.place(wanted(b"a"), lambda _: True) == Placed([b"a"], [slot], [])
    status = blocks.status()
    assert (status.corrupt, status.hits, status.stored) == (1, 0, 4)


def test_only_a_reader_condemns() -> None:
    blocks = holding(b"a")
    blocks.condemn(range(SLOTS))
    assert blocks.find(b"a") is Found.READY


def test_what_a_request_used_outlives_what_none_used() -> None:
    blocks = holding(b"a", b"b", b"c", b"d")
    blocks.used([b"d", b"unknown"])
    assert blocks.place(wanted(b"e", b"f", b"g"), nothing).evicted == [b"c", b"b", b"a"]


def test_nothing_is_left_after_it_was_cleared() -> None:
    blocks = holding(b"a", b"b")
    blocks.clear()
    assert blocks.find(b"a") is Found.MISSING
    assert len(blocks.place(wanted(b"a", b"b", b"c", b"d"), nothing).slots) == SLOTS


def test_a_tier_that_holds_no_block_is_refused() -> None:
    assert slots_in(25, 10) == 2
    with pytest.raises(ValueError, match=r"kv\.tiers: a host tier of 9 bytes holds no block: one has 10 bytes"):
        slots_in(9, 10)


class Life(RuleBasedStateMachine):
    """Readers and writers in any order. Each writes its key into its slot, and reads what it expects."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = HostBlocks(SLOTS, 10)
        self.memory: dict[int, bytes] = {}
        self.writing: list[Placed] = []
        self.reading: list[tuple[bytes, int]] = []

    @rule(numbers=st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True))
    def store(self, numbers: list[int]) -> None:
        placed = self.blocks.place(wanted(*(b"%d" % number for number in numbers)), nothing)
        self.writing.append(placed)
        for name, slot in zip(placed.keys, placed.slots, strict=True):
            assert slot not in {slot for _, slot in self.reading}, "a slot that is read is written"
            self.memory[slot] = name
            self.blocks.learn(0, {slot: name})

    @precondition(lambda self: self.writing)
    @rule(succeeds=st.booleans())
    def end_write(self, succeeds: bool) -> None:
        placed = self.writing.pop(0)
        if succeeds:
            assert self.blocks.written(placed.keys) == placed.keys
        else:
            self.blocks.not_written(placed.keys)

    @rule(number=st.integers(0, 7))
    def load(self, number: int) -> None:
        name = b"%d" % number
        if self.blocks.find(name) is Found.READY:
            ((slot, sums),) = self.blocks.read([name])
            assert self.memory[slot] == sums[0] == name
            self.reading.append((name, slot))

    @precondition(lambda self: self.reading)
    @rule(corrupt=st.booleans())
    def end_load(self, corrupt: bool) -> None:
        name, slot = self.reading.pop(0)
        assert self.memory[slot] == name
        if corrupt:
            self.blocks.condemn([slot])
            assert self.blocks.find(name) is Found.MISSING
        self.blocks.read_done([name])

    @invariant()
    def counts_add_up(self) -> None:
        status = self.blocks.status()
        writing = sum(len(placed.keys) for placed in self.writing)
        assert status.bytes == 10 * status.blocks <= 10 * SLOTS
        assert status.stored - status.evicted - status.corrupt <= status.blocks - writing <= status.stored


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
