"""A prompt's keys: the same as of one prompt, wherever the shown output begins."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from front_proxy.request.prompt_keys import PromptKeys
from kv_transfer.prefix import block_keys
from kv_transfer.prefix.block_keys import prompt_keys

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@given(
    prompt=TOKENS, shown=TOKENS, size=st.integers(1, 7), other=st.integers(1, 7), salt=st.sampled_from(["", "tenant"])
)
def test_they_are_those_of_prompt_and_shown_output_as_one(
    prompt: list[int], shown: list[int], size: int, other: int, salt: str
) -> None:
    keys = PromptKeys(prompt, salt=salt or None)
    assert keys.packed(size) == prompt_keys(prompt, size, salt=salt)
    assert keys.packed(size, shown) == prompt_keys([*prompt, *shown], size, salt=salt)
    assert keys.packed(other, shown) == prompt_keys([*prompt, *shown], other, salt=salt)
    assert keys.packed(0, shown) == b""


def test_a_prompt_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    extend = block_keys.extend

    def counted(parent: bytes, token_ids: Any, block_size_tokens: int) -> list[bytes]:
        hashed.append(len(token_ids))
        return extend(parent, token_ids, block_size_tokens)

    monkeypatch.setattr(block_keys, "extend", counted)
    keys = PromptKeys(range(100))
    assert len({keys.packed(32) for _ in range(3)}) == 1
    keys.packed(32, [7] * 40)
    assert hashed == [100, 44]
