"""A file is read as a block only if it is that block, whole and unchanged."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.tiers.block_file import HEADER_BYTES, Fault, Label, check, header, key_of, name

LABEL = Label(fingerprint=b"f" * 32, key=b"k" * 36, rank=1, ranks=2)
PAYLOAD = bytes(range(256)) * 8
SUM = b"checksum"
PAGE = header(LABEL, PAYLOAD, SUM)


def test_what_was_written_is_read() -> None:
    assert len(PAGE) == HEADER_BYTES
    assert check(LABEL, PAGE, PAYLOAD) == SUM


@given(st.integers(0, len(PAYLOAD) - 1), st.integers(0, 7))
def test_a_flipped_bit_of_the_block_is_noticed(byte: int, bit: int) -> None:
    changed = bytearray(PAYLOAD)
    changed[byte] ^= 1 << bit
    assert check(LABEL, PAGE, bytes(changed)) is Fault.CHANGED


@given(st.integers(0, 180), st.integers(0, 7))
def test_a_flipped_bit_of_the_header_is_noticed(byte: int, bit: int) -> None:
    changed = bytearray(PAGE)
    changed[byte] ^= 1 << bit
    # Bits of what fills the page up mean nothing.
    assert isinstance(check(LABEL, bytes(changed), PAYLOAD), Fault) or not any(PAGE[byte : byte + 1])


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"fingerprint": b"g" * 32}, Fault.OTHER_MODEL),
        ({"key": b"l" * 36}, Fault.OTHER_BLOCK),
        ({"key": b"k" * 35}, Fault.OTHER_BLOCK),
        ({"rank": 0}, Fault.OTHER_BLOCK),
        ({"ranks": 4}, Fault.OTHER_BLOCK),
    ],
)
def test_another_block_is_not_taken_for_this_one(other: dict[str, object], fault: Fault) -> None:
    assert check(msgspec.structs.replace(LABEL, **other), PAGE, PAYLOAD) is fault


@pytest.mark.parametrize("cut", [0, 1, 100, HEADER_BYTES - 1])
def test_a_cut_header_is_no_header(cut: int) -> None:
    assert check(LABEL, PAGE[:cut], PAYLOAD) is Fault.TRUNCATED
    assert check(LABEL, bytes(HEADER_BYTES), PAYLOAD) is Fault.NO_HEADER
    assert check(LABEL, PAGE, PAYLOAD[:-1]) is Fault.TRUNCATED


@given(st.binary(min_size=1, max_size=64))
def test_a_name_is_of_one_key_and_leads_nowhere_else(key: bytes) -> None:
    assert key_of(name(key)) == key
    assert set(name(key)) <= set("0123456789abcdef")


@pytest.mark.parametrize("text", ["lock", "probe.draft", "ab.draft", "..", "AB", "a b", "ab cd", "é", ""])
def test_what_is_no_name_of_a_block_is_not_read_as_one(text: str) -> None:
    assert key_of(text) is None
