"""The book of a store that workers share: what can be read, what is worth writing, what may go."""

from __future__ import annotations

from kv_transfer.tiers.segment import NO_SCOPE
from kv_transfer.tiers.store_blocks import Segment, StoreBlocks


def key(number: int) -> bytes:
    return b"key%d" % number


def segment(name: str, *numbers: int, size: int = 100, scope: str = NO_SCOPE) -> Segment:
    sums = b"".join(b"sum%05d" % number for number in numbers)
    return Segment(name, scope, size, tuple(map(key, numbers)), (sums, sums.upper()))


def store(*segments: Segment, scope_share: float = 1.0) -> StoreBlocks:
    made = StoreBlocks("file", 1000, 32, scope_share=scope_share)
    for each in segments:
        made.appeared(each)
    return made


def test_a_block_is_found_with_its_place_and_the_checksums_of_every_rank() -> None:
    book = store(segment("a", 1, 2))
    part = book.read(key(2))
    assert (part.segment, part.position, part.sums) == ("a", 1, {0: b"sum00002", 1: b"SUM00002"})
    assert book.run([key(1), key(2), key(3), key(1)]) == 2
    book.read_ended("a", sound=True)
    assert book.status().hits == 1


def test_a_segment_that_is_told_twice_or_gone_twice_changes_nothing() -> None:
    book = store(segment("a", 1, 2))
    assert book.appeared(segment("a", 1, 2)) == []
    assert book.vanished("a") == [key(1), key(2)]
    assert book.vanished("a") == []
    assert book.status().bytes == 0


def test_a_block_in_two_segments_is_still_here_when_the_first_goes() -> None:
    book = store(segment("a", 1, 2))
    assert book.appeared(segment("b", 2, 3)) == [key(3)]
    assert book.vanished("a") == [key(1)]
    assert key(2) in book


def test_a_block_is_worth_writing_when_a_second_request_has_it() -> None:
    book = store(segment("a", 1))
    assert book.used([key(1), key(2)]) == []
    assert book.used([key(1), key(2), key(3)]) == [key(2)]
    book.appeared(segment("b", 2))
    assert book.used([key(2), key(3)]) == [key(3)]


def test_what_may_go_is_what_was_used_least_and_is_not_being_read() -> None:
    book = store(segment("a", 1), segment("b", 2), segment("c", 3))
    book.used([key(1)])
    assert book.room(100, NO_SCOPE).victims == ["b", "c", "a"]
    book.read(key(2))
    assert book.room(100, NO_SCOPE).victims == ["c", "a"]
    book.read_ended("b", sound=False)
    assert book.room(100, NO_SCOPE).victims[0] == "b"


def test_a_scope_that_has_its_share_makes_room_for_itself() -> None:
    book = store(segment("a", 1), segment("b", 2, size=400, scope="tenant"), scope_share=0.5)
    assert book.room(100, "tenant").free_bytes == 0
    room = book.room(300, "tenant")
    assert (room.victims, room.free_bytes) == (["b"], 200)
    assert book.room(300, NO_SCOPE).free_bytes == 0


def test_blocks_that_are_not_what_was_stored_condemn_their_segments() -> None:
    book = store(segment("a", 1, 2), segment("b", 3))
    assert book.condemn([key(1), key(2), key(9)]) == ["a"]


def test_what_this_worker_removed_for_others_is_counted() -> None:
    book = store(segment("a", 1, 2), segment("b", 3))
    book.vanished("a", evicted=True)
    book.vanished("b")
    status = book.status()
    assert (status.evicted, status.blocks) == (2, 0)
