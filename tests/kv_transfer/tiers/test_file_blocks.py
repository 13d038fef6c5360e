"""Blocks in files: written at the second use, never read while they are written, gone when they are not sound."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.tiers.file_blocks import FileBlocks

ROOM = 4


def holding(*keys: bytes) -> FileBlocks:
    files = FileBlocks(ROOM * 10, 10, 32)
    files.write(keys, {key: 32 * (place + 1) for place, key in enumerate(keys)})
    for key in keys:
        files.write_ended(key, written=True)
    return files


def test_a_block_is_worth_writing_when_a_second_request_has_it() -> None:
    files = FileBlocks(ROOM * 10, 10, 32)
    assert files.used([b"a", b"b"]) == []
    assert files.used([b"a", b"c"]) == [b"a"]
    assert files.write([b"a"], {}) == ([b"a"], [])
    assert files.used([b"a", b"b"]) == [b"b"]


def test_a_block_is_there_when_it_is_written_and_not_before() -> None:
    files = FileBlocks(ROOM * 10, 10, 32)
    files.write([b"a", b"b"], {})
    assert not files.has(b"a") and files.run([b"a"]) == 0
    files.write_ended(b"a", written=True)
    files.write_ended(b"b", written=False)
    assert files.has(b"a") and not files.has(b"b")
    assert files.run([b"a", b"b"]) == 1
    assert (files.status().stored, files.status().bytes) == (1, 10)


def test_a_full_tier_lets_the_least_valuable_go_before_it_writes() -> None:
    files = holding(b"a", b"b", b"c", b"d")
    files.used([b"d", b"a"])
    accepted, gone = files.write([b"e", b"f", b"g"], {})
    # Of what one request had, the end goes first.
    assert (accepted, gone) == ([b"e", b"f", b"g"], [b"c", b"b", b"d"])


def test_what_is_read_stays_until_the_last_reader_has_it() -> None:
    files = holding(b"a", b"b", b"c", b"d")
    for _ in range(2):
        files.read(b"d")
    assert b"d" not in files.write([b"e", b"f"], {})[1]
    assert not files.read_ended(b"d", sound=False, corrupt=True)
    assert files.read_ended(b"d", sound=False)
    assert not files.has(b"d")
    assert (files.status().corrupt, files.status().hits) == (1, 0)


def test_what_lay_there_counts_and_what_does_not_fit_goes() -> None:
    files = FileBlocks(ROOM * 10, 10, 32)
    assert files.found([b"%d" % number for number in range(6)]) == [b"0", b"1"]
    assert files.run([b"2", b"3", b"4", b"5"]) == 4
    assert FileBlocks(9, 10, 32).found([b"a"]) == [b"a"]


def test_a_disk_that_hangs_holds_up_a_bounded_number_of_blocks() -> None:
    files = FileBlocks(10_000, 10, 32)
    accepted, _ = files.write([b"%d" % number for number in range(900)], {})
    assert len(accepted) == 512
    for key in accepted:
        files.write_ended(key, written=True)
    files.write([b"more"], {})
    files.write_ended(b"more", written=True)
    for key in accepted:
        files.read(key)
    assert not files.has(b"more")
    files.read_ended(accepted[0], sound=True)
    assert files.has(b"more")


def test_a_block_that_is_forgotten_goes_unless_something_is_under_way() -> None:
    files = holding(b"a", b"b")
    files.read(b"a")
    assert not files.forget(b"a")
    assert files.forget(b"b") and not files.forget(b"b")
    assert list(files) == [b"a"]


class Life(RuleBasedStateMachine):
    """Reads and writes in any order, and a set of files that says what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.files = FileBlocks(ROOM * 10, 10, 32)
        self.there: set[bytes] = set()
        self.writing: list[bytes] = []
        self.reading: list[bytes] = []

    @rule(numbers=st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True))
    def write(self, numbers: list[int]) -> None:
        accepted, gone = self.files.write([b"%d" % number for number in numbers], {})
        assert not set(gone) & {*self.reading, *self.writing}
        self.there -= set(gone)
        assert not set(accepted) & self.there
        self.writing += accepted

    @precondition(lambda self: self.writing)
    @rule(written=st.booleans())
    def end_write(self, written: bool) -> None:
        key = self.writing.pop(0)
        self.files.write_ended(key, written=written)
        if written:
            self.there.add(key)

    @rule(number=st.integers(0, 7))
    def read(self, number: int) -> None:
        key = b"%d" % number
        assert self.files.has(key) == (key in self.there)
        if key in self.there:
            self.files.read(key)
            self.reading.append(key)

    @precondition(lambda self: self.reading)
    @rule(sound=st.booleans())
    def end_read(self, sound: bool) -> None:
        key = self.reading.pop(0)
        if self.files.read_ended(key, sound=sound, corrupt=not sound):
            assert not sound and key not in self.reading
            self.there.discard(key)

    @invariant()
    def holds_what_it_says(self) -> None:
        assert set(self.files) == self.there | set(self.writing)
        assert self.files.status().bytes == 10 * len(set(self.files)) <= 10 * ROOM


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
