"""The digest that ties KV to its prompt: equal for equal prompts everywhere, different for all others."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.integrity.prompt_digest import DIGEST_BYTES, prompt_digest

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=50)
PROMPTS = st.tuples(TOKENS, st.text(max_size=5), st.text(max_size=5))


@given(PROMPTS, PROMPTS)
def test_equal_prompts_and_only_those_have_equal_digests(
    a: tuple[list[int], str, str], b: tuple[list[int], str, str]
) -> None:
    ours, theirs = (prompt_digest(tokens, cache_salt=salt, model=model) for tokens, salt, model in (a, b))
    assert (ours == theirs) is (a == b)
    assert len(ours) == DIGEST_BYTES


def test_it_is_the_same_on_every_machine() -> None:
    context = hashlib.blake2b(struct.pack("<Q", 1) + b"s" + struct.pack("<Q", 1) + b"m", digest_size=16).digest()
    wanted = hashlib.blake2b(struct.pack("<3I", 2, 2**32 - 1, 1), digest_size=8, key=context).digest()
    assert prompt_digest([2, 2**32 - 1, 1], cache_salt="s", model="m") == wanted


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_id_is_an_error(token: int) -> None:
    with pytest.raises(OverflowError):
        prompt_digest([token], cache_salt=None, model="m")
