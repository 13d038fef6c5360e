"""The form of a segment: what is read is what was written, and nothing else passes for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.tiers import segment
from kv_transfer.tiers.segment import BLOCKS_MAX, INDEX_BYTES, BadSegment, Entry, Index

BLOCK_BYTES = 4096
WHOLE_BYTES = segment.segment_bytes(3, BLOCK_BYTES)


def index(blocks: int = 3) -> Index:
    entries = tuple(
        Entry(b"%036d" % number, parent=b"p" * 32, digest=b"d" * 7, depth_tokens=32 * number, checksum=b"c" * 8)
        for number in range(blocks)
    )
    return Index(
        fingerprint="f" * 32,
        scope=segment.NO_SCOPE,
        rank=0,
        ranks=2,
        block_bytes=BLOCK_BYTES,
        regions=(((0, 2048), (2048, 2048)),) * 60,
        entries=entries,
    )


@pytest.mark.parametrize("blocks", [1, BLOCKS_MAX])
def test_an_index_is_read_as_it_was_written_and_fits_however_many_layers_there_are(blocks: int) -> None:
    page = segment.encode(index(blocks))
    assert len(page) == INDEX_BYTES
    assert segment.decode(page, size_bytes=segment.segment_bytes(blocks, BLOCK_BYTES)) == index(blocks)


@given(st.integers(0, 600), st.integers(0, 7))
def test_any_changed_bit_of_an_index_is_noticed(place: int, bit: int) -> None:
    page = bytearray(segment.encode(index()))
    page[place] ^= 1 << bit
    with pytest.raises(BadSegment):
        segment.decode(bytes(page), size_bytes=segment.segment_bytes(3, BLOCK_BYTES))


@pytest.mark.parametrize("size", [0, 100, INDEX_BYTES, WHOLE_BYTES - 1, WHOLE_BYTES + BLOCK_BYTES])
def test_a_segment_of_another_length_than_its_index_says_is_none(size: int) -> None:
    page = segment.encode(index())[:size]
    with pytest.raises(BadSegment):
        segment.decode(page, size_bytes=size)


def test_names_sort_by_time_and_say_scope_and_size() -> None:
    scope = segment.scope_of("a salt")
    names = [
        segment.name(time_ms=time_ms, chance=chance, scope=scope, size_bytes=1 << 20)
        for time_ms, chance in ((1, 9), (1_700_000_000_000, 2**32 - 1), (1_700_000_000_001, 0))
    ]
    assert names == sorted(names)
    about = segment.parse_name(names[1])
    assert about is not None and (about.scope, about.size_bytes) == (scope, 1 << 20)
    assert "salt" not in names[1]


@pytest.mark.parametrize("text", ["room", "in_use", "../../x.kv", "0-0-0-0.kv", "probe.draft", ""])
def test_other_names_are_none(text: str) -> None:
    assert segment.parse_name(text) is None


def test_prompts_without_a_salt_are_of_one_scope_and_each_salt_has_its_own() -> None:
    assert segment.scope_of("") == segment.NO_SCOPE
    assert len({segment.scope_of(salt) for salt in ("", "a", "b")}) == 3


def test_a_segment_is_an_eighth_of_the_capacity_at_most() -> None:
    assert segment.blocks_in(1 << 40, 2 << 20) == 15
    assert segment.blocks_in(16 << 20, 128 << 10) == 15
    assert segment.blocks_in(1 << 20, 2 << 20) == 1
    assert segment.blocks_in(1 << 40, 4096) == BLOCKS_MAX
