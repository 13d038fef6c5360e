"""Leases that were pulled are released all the same, together."""

from __future__ import annotations

import asyncio

from engine.vllm.release_batcher import ReleaseBatcher


async def test_what_was_pulled_is_released_together_and_once() -> None:
    told: asyncio.Queue[list[str]] = asyncio.Queue()
    late = ReleaseBatcher(told.put, 0.001)
    async with asyncio.timeout(5):
        late.add("a")
        late.add("b")
        assert await told.get() == ["a", "b"]
        late.add("c")
        assert await told.get() == ["c"]
    assert told.empty()
