"""The catalog of a tier: it never holds too much, lets go of the least valuable, and of a prompt's end first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.tiers.catalog import Catalog

CAPACITY = 10


def key(number: int) -> bytes:
    return b"%03d" % number


def full(capacity: int = CAPACITY) -> Catalog[bytes]:
    """Blocks 0, 1, ... of one prompt."""
    catalog: Catalog[bytes] = Catalog(capacity)
    for number in range(capacity):
        catalog.add(key(number), size_bytes=1, saved_tokens=32, depth=32 * (number + 1))
    return catalog


def test_the_end_of_a_prompt_leaves_before_its_beginning() -> None:
    assert full().make_room(3) == [key(9), key(8), key(7)]


def test_what_is_used_again_outlives_what_is_not() -> None:
    catalog = full()
    catalog.use([key(9), b"not here"])
    assert key(9) not in catalog.make_room(9)
    assert catalog.make_room(CAPACITY) == [key(9)]


def test_of_blocks_used_as_often_the_older_request_goes_and_of_one_request_the_end() -> None:
    catalog: Catalog[bytes] = Catalog(6)
    for request in (b"old", b"new"):
        # Its blocks come in over several steps.
        names = [request + key(number) for number in range(3)]
        for place, name in enumerate(names):
            catalog.add(name, size_bytes=1, saved_tokens=32, depth=32 * (place + 1))
        catalog.use(names, new=names)
    gone = [catalog.make_room(catalog.capacity_bytes - catalog.used_bytes + 1)[0] for _ in range(6)]
    assert gone == [request + key(number) for request in (b"old", b"new") for number in (2, 1, 0)]


def test_what_was_used_often_long_ago_leaves_in_the_end() -> None:
    catalog = full(2)
    for _ in range(5):
        catalog.use([key(0)])
    for number in range(10, 20):
        catalog.make_room(1)
        catalog.add(key(number), size_bytes=1, saved_tokens=32, depth=32)
    assert key(0) not in catalog


def test_small_blocks_that_save_as_much_outlive_large_ones() -> None:
    catalog: Catalog[bytes] = Catalog(CAPACITY)
    catalog.add(b"large", size_bytes=4, saved_tokens=32, depth=32)
    catalog.add(b"small", size_bytes=1, saved_tokens=32, depth=64)
    assert catalog.make_room(6) == [b"large"]


def test_what_is_pinned_or_to_be_kept_stays_and_less_room_is_made() -> None:
    catalog = full()
    for number in range(6):
        catalog.pin(key(number))
    assert len(catalog.make_room(CAPACITY, keep=lambda each: each == key(7))) == 3
    assert sorted(catalog) == [key(number) for number in (0, 1, 2, 3, 4, 5, 7)]
    catalog.unpin(key(5))
    assert set(catalog.make_room(CAPACITY)) == {key(5), key(7)}


class Life(RuleBasedStateMachine):
    """Anything may happen to a catalog, and a plain list of blocks says what it must do."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog: Catalog[bytes] = Catalog(CAPACITY)
        self.sizes: dict[bytes, int] = {}
        self.pins: dict[bytes, int] = {}
        self.values: dict[bytes, tuple[float, int, int]] = {}
        self.clock = 0.0

    @rule(number=st.integers(0, 9), size=st.integers(1, 4), saved=st.integers(1, 64), kept=st.integers(0, 9))
    def store(self, number: int, size: int, saved: int, kept: int) -> None:
        name = key(number)
        if name in self.sizes:
            return
        gone = self.catalog.make_room(size, keep=lambda each: each == key(kept))
        for each in gone:
            may_go = {k: v for k, v in self.values.items() if not self.pins[k] and k != key(kept)}
            worth = {k: self.clock_of(v) for k, v in may_go.items()}
            assert worth[each] == min(worth.values())
            self.forget(each)
        room = CAPACITY - sum(self.sizes.values())
        left = [k for k in self.sizes if not self.pins[k] and k != key(kept)]
        assert room >= size or not left
        if room >= size:
            self.catalog.add(name, size_bytes=size, saved_tokens=saved, depth=number)
            self.sizes[name], self.pins[name] = size, 0
            self.values[name] = (self.clock + saved / size, 1, saved)

    def clock_of(self, value: tuple[float, int, int]) -> float:
        return value[0]

    def forget(self, name: bytes) -> None:
        self.clock = max(self.clock, self.values.pop(name)[0])
        del self.sizes[name], self.pins[name]

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sizes)))
        _, uses, saved = self.values[name]
        self.values[name] = (self.clock + (uses + 1) * saved / self.sizes[name], uses + 1, saved)
        self.catalog.use([name])

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.sizes)))
        if pinned:
            self.catalog.pin(name)
            self.pins[name] += 1
        elif self.pins[name]:
            self.catalog.unpin(name)
            self.pins[name] -= 1

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sizes)))
        self.catalog.remove(name)
        del self.sizes[name], self.pins[name], self.values[name]

    @invariant()
    def holds_what_it_says(self) -> None:
        assert sorted(self.catalog) == sorted(self.sizes)
        assert self.catalog.used_bytes == sum(self.sizes.values()) <= CAPACITY


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50))
def test_its_memory_does_not_grow_with_what_has_left(rounds: int) -> None:
    catalog: Catalog[bytes] = Catalog(1)
    for _ in range(rounds * 20):
        catalog.add(b"k", size_bytes=1, saved_tokens=1, depth=1)
        catalog.remove(b"k")
    assert len(catalog._heap) <= 65
