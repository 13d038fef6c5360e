"""What every engine says of its blocks: a mirror of it has the keys that a front proxy computes, and no others."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import pytest_asyncio

from engine.protocol import Engine, EngineRequest, Hold, TakeOver
from engine.vllm.engine import VllmEngine
from kv_transfer.prefix.block_keys import prompt_keys, unpack
from kv_transfer.prefix.events import GONE
from tests.contract.conftest import Pair
from tests.support.engines import collect, first_of, prefill, request
from tests.support.polling import until
from worker.kv_events.event_order import EventOrder
from worker.kv_events.mirror import BlockMirror

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAIT_S = 10.0
_numbers = itertools.count()


def prompt(length: int) -> list[int]:
    """One that no other test has used."""
    chooser = random.Random(f"blocks {next(_numbers)}")
    return [chooser.randrange(3, 512) for _ in range(length)]


class Watched:
    """An engine, and what the scheduler would have been told of its blocks."""

    def __init__(self, engine: Engine) -> None:
        info = engine.info
        self.engine = engine
        self.size = info.block_size_tokens
        self.mirror = BlockMirror(epoch=1, block_size_tokens=self.size, blocks_max=2 * info.kv_blocks_total)
        self.held: set[int] = set()
        assert engine.report_blocks(EventOrder(self.mirror))

    def keys(self, tokens: list[int], salt: str = "") -> set[int]:
        return set(unpack(prompt_keys(tokens, self.size, salt=salt)))

    async def told(self, holds: Callable[[], bool]) -> None:
        """Wait until what was told is so."""

        def look() -> bool:
            delta = self.mirror.take(1_000_000)
            if delta.reset:
                self.held.clear()
            for level, packed in delta.levels.items():
                change = self.held.difference_update if level == GONE else self.held.update
                change(unpack(packed))
            return holds()

        await until(look, within_s=WAIT_S)


class WatchedPair(msgspec.Struct, frozen=True):
    prefill: Watched
    decode: Watched


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def watched(engines: Pair) -> AsyncIterator[WatchedPair]:
    yield WatchedPair(Watched(engines.prefill), Watched(engines.decode))


async def test_a_prompt_s_full_blocks_are_told_under_its_keys_and_serve_it_again(watched: WatchedPair) -> None:
    one, tokens = watched.prefill, prompt(100)
    assert first_of(await collect(one.engine, request(tokens))).cached_tokens == 0
    await one.told(lambda: one.held >= one.keys(tokens))
    held = len(one.held)
    assert first_of(await collect(one.engine, request(tokens))).cached_tokens == 96
    longer = [*tokens, *prompt(40)]
    await collect(one.engine, request(longer))
    await one.told(lambda: one.held >= one.keys(longer))
    assert len(one.held) == held + 1
    assert one.mirror.losses == one.mirror.ignored == 0


async def test_other_salts_are_other_blocks(watched: WatchedPair) -> None:
    one, tokens = watched.prefill, prompt(64)
    for salt in ("", "tenant", "other"):
        plain: EngineRequest = request(tokens)
        salted = msgspec.structs.replace(plain, cache_salt=salt or None)
        assert first_of(await collect(one.engine, salted)).cached_tokens == 0
        await one.told(lambda salt=salt: one.held >= one.keys(tokens, salt))  # type: ignore[misc]
    assert len(one.keys(tokens) | one.keys(tokens, "tenant") | one.keys(tokens, "other")) == 6


async def test_pulled_blocks_are_told_by_the_engine_that_pulled_them(watched: WatchedPair) -> None:
    tokens = prompt(100)
    _, handoff = await prefill(watched.prefill.engine, tokens)
    await collect(watched.decode.engine, request(tokens, TakeOver(handoff)))
    for one in (watched.prefill, watched.decode):
        await one.told(lambda one=one: one.held >= one.keys(tokens))  # type: ignore[misc]
    assert first_of(await collect(watched.decode.engine, request(tokens))).cached_tokens == 96


async def test_evicted_blocks_are_gone(watched: WatchedPair) -> None:
    one, tokens = watched.prefill, prompt(96)
    await collect(one.engine, request(tokens, max_tokens=1))
    await one.told(lambda: one.held >= one.keys(tokens))
    blocks = one.engine.info.kv_blocks_total
    for _ in range(blocks * one.size // 960 + 1):
        await collect(one.engine, request(prompt(960), max_tokens=1))
    await one.told(lambda: not one.held & one.keys(tokens))
    assert 0.8 * blocks < len(one.held) <= blocks
    assert one.mirror.losses == 0
    assert first_of(await collect(one.engine, request(tokens, max_tokens=1))).cached_tokens == 0
    await one.told(lambda: one.held >= one.keys(tokens))


async def test_a_reset_cache_holds_nothing(watched: WatchedPair) -> None:
    one, tokens = watched.prefill, prompt(96)
    if not isinstance(one.engine, VllmEngine):
        pytest.skip("the fake engine's cache is never reset")
    await collect(one.engine, request(tokens, Hold(lease_s=0.01), max_tokens=1))
    await until(lambda: one.engine.load().kv_blocks_used == 0, within_s=WAIT_S)
    assert await one.engine._llm.reset_prefix_cache()
    # vLLM tells with its next step.
    after = prompt(32)
    await collect(one.engine, request(after, max_tokens=1))
    await one.told(lambda: one.held == one.keys(after))
