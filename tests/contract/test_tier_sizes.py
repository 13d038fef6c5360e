"""One folder under engines of two tensor-parallel sizes: neither reads what the other wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import test_tiers
from tests.contract.test_tiers import BLOCK_TOKENS, BLOCKS, Start, evict, prompt, segments, written
from tests.support.engines import collect, first_of, request, tokens_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

start = test_tiers.start


async def test_another_tensor_parallel_size_finds_no_block(start: Start, tmp_path: Path) -> None:
    """Stock tiers serve what one rank wrote to either of two, silently."""
    tokens, engine = prompt(), await start("tier-1")
    first = await written(engine, tokens)
    one = set(segments(tmp_path))
    two_ranks = await start("tier-2", tensor_parallel_size=2)
    outputs = await collect(two_ranks, request(tokens))
    assert first_of(outputs).external_tokens == 0
    assert tokens_of(outputs) == first
    # Each finds its own in the same folder.
    await written(two_ranks, tokens)
    assert set(segments(tmp_path)) > one
    for each in (engine, two_ranks):
        await evict(each)
        await evict(each)
        outputs = await collect(each, request(tokens))
        assert tokens_of(outputs) == first
        assert first_of(outputs).external_tokens == BLOCKS * BLOCK_TOKENS
