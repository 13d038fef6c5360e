"""Block keys: what they depend on, and that a chain may be continued anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.prefix.block_keys import KEY_BYTES, Media, extend, pack, pack_keys, prompt_keys, root, unpack

TOKENS = list(range(1000, 1100))


def test_the_same_prompt_has_the_same_keys_on_every_machine() -> None:
    assert prompt_keys(TOKENS[:64], 32, lora="a", salt="b").hex() == "5a14eb53ec237f009412c40cd8274e00"


@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.integers(1, 20), st.integers(0, 5))
def test_a_chain_that_is_continued_from_any_block_is_the_same_chain(tokens: list[int], size: int, cut: int) -> None:
    whole = extend(root(), tokens, size)
    assert len(whole) == len(tokens) // size
    cut = min(cut, len(whole))
    parent = whole[cut - 1] if cut else root()
    assert whole[:cut] + extend(parent, tokens[cut * size :], size) == whole
    assert prompt_keys(tokens, size) == pack(whole)
    assert pack_keys(unpack(pack(whole))) == pack(whole)


def test_a_key_covers_all_that_kv_depends_on() -> None:
    image = [Media("image", 40, 10)]
    variants = [
        prompt_keys(TOKENS, 32),
        prompt_keys([*TOKENS[:5], 7, *TOKENS[6:]], 32),
        prompt_keys(TOKENS, 32, lora="x"),
        prompt_keys(TOKENS, 32, salt="x"),
        prompt_keys(TOKENS, 32, lora="x", salt="x"),
    ]
    last = [keys[-KEY_BYTES:] for keys in variants]
    assert len({keys[:KEY_BYTES] for keys in variants}) == len(set(last)) == len(variants)
    # An image changes the block that it lies in and those behind it.
    plain, shown = unpack(variants[0]), unpack(prompt_keys(TOKENS, 32, media=image))
    assert plain[0] == shown[0] and plain[1] != shown[1] and plain[2] != shown[2]
    assert shown != unpack(prompt_keys(TOKENS, 32, media=[Media("image", 41, 10)]))
    assert shown != unpack(prompt_keys(TOKENS, 32, media=[Media("other", 40, 10)]))


def test_an_image_over_several_blocks_is_in_the_keys_of_each() -> None:
    expected = extend(root(), TOKENS[:96], 32, [None, [("image", 30 - 32), ("next", 28)], None])
    assert prompt_keys(TOKENS, 32, media=[Media("image", 32 - 2, 4), Media("next", 60, 4)])[8:] != pack(expected)[8:]
    expected = extend(root(), TOKENS[:96], 32, [[("image", 30)], [("image", -2), ("next", 28)], None])
    assert prompt_keys(TOKENS, 32, media=[Media("image", 30, 4), Media("next", 60, 4)]) == pack(expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(OverflowError):
        prompt_keys([-1] * 32, 32)
    with pytest.raises(ValueError, match="8 bytes each, these are 9"):
        unpack(b"123456789")
    assert prompt_keys(TOKENS[:31], 32) == b""
