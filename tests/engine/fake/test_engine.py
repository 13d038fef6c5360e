"""The fake engine keeps its books: blocks, leases, hand-offs and a clock that may be virtual."""

from __future__ import annotations

import asyncio

import pytest

from engine.config import EngineConfig, FakeEngineConfig
from engine.epoch import EPOCH_MIN_VARIABLE, next_epoch
from engine.fake.engine import FakeEngine
from engine.fake.fabric import FakeKvFabric
from engine.protocol import EngineDead, Finish, MeasuredStep, TakeOver
from simulation.kernel import virtual_loop
from tests.support.engines import collect, first_of, prefill, request, tokens_of
from tests.support.polling import until

TOKENS = list(range(3, 103))


def engine(worker_id: str = "p0", fabric: FakeKvFabric | None = None, **fake: float) -> FakeEngine:
    config = EngineConfig(kind="fake", fake=FakeEngineConfig(**fake))  # type: ignore[arg-type]
    return FakeEngine(config, worker_id=worker_id, epoch=1, fabric=fabric or FakeKvFabric())


async def test_an_engine_is_newer_than_its_predecessor_also_where_the_clock_was_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = 10**15
    assert 0 < next_epoch() < ahead
    monkeypatch.setenv(EPOCH_MIN_VARIABLE, str(ahead))
    started = await FakeEngine.start(EngineConfig(kind="fake"), worker_id="p0")
    assert (started.info.epoch, started.info.engine_id) == (ahead, f"p0-{ahead}")
    monkeypatch.setenv(EPOCH_MIN_VARIABLE, "abc")
    with pytest.raises(ValueError, match="BATON_EPOCH_MIN must be a whole number, got 'abc'"):
        next_epoch()


def test_every_step_has_its_fixed_part_and_lasts_from_the_end_of_the_one_before() -> None:
    async def steps() -> list[MeasuredStep]:
        made = engine(step_us=10_000, decode_step_us=0, decode_step_us_per_request=200, prefill_us_per_token=100)
        await collect(made, request(TOKENS, max_tokens=3))
        return made.take_steps()

    prompt, *decoding = virtual_loop.run(steps())
    assert prompt == MeasuredStep(10_000 + 200 + 100 * len(TOKENS), len(TOKENS), len(TOKENS) ** 2 // 2)
    assert [step.duration_us for step in decoding] == [10_200, 10_200]


async def test_the_seed_matters_only_when_sampling() -> None:
    greedy = tokens_of(await collect(engine(), request(TOKENS)))
    assert greedy == tokens_of(await collect(engine(), request(TOKENS, seed=5)))
    sampled = tokens_of(await collect(engine(), request(TOKENS, seed=5, temperature=1.0)))
    assert sampled != tokens_of(await collect(engine(), request(TOKENS, seed=6, temperature=1.0)))


async def test_what_does_not_fit_waits_for_blocks() -> None:
    fake = engine(kv_blocks_total=5)
    outputs = await asyncio.gather(*(collect(fake, request([3 + n, *TOKENS])) for n in range(3)))
    assert all(len(tokens_of(each)) == 8 for each in outputs)
    assert fake.load().kv_blocks_used == 0


async def test_a_full_cache_starts_the_latest_arrival_over_without_losing_tokens() -> None:
    fake = engine(kv_blocks_total=4)
    alone = [tokens_of(await collect(engine(), request([3 + n] * 30, max_tokens=40))) for n in range(2)]
    both = await asyncio.gather(*(collect(fake, request([3 + n] * 30, max_tokens=40)) for n in range(2)))
    assert [tokens_of(outputs) for outputs in both] == alone
    assert fake.load().kv_blocks_used == 0


async def test_another_prompts_handoff_is_an_error_not_an_answer() -> None:
    fabric = FakeKvFabric()
    holder, decode = engine("p0", fabric), engine("d0", fabric)
    _, handoff = await prefill(holder, TOKENS)
    outputs = await collect(decode, request(TOKENS[::-1], TakeOver(handoff)))
    assert outputs[-1].finish == Finish("error")
    assert decode.load().kv_blocks_used == 0


async def test_a_handoff_from_another_process_is_trusted() -> None:
    holder, decode = engine("p0", FakeKvFabric()), engine("d0", FakeKvFabric())
    _, handoff = await prefill(holder, TOKENS)
    outputs = await collect(decode, request(TOKENS, TakeOver(handoff)))
    assert first_of(outputs).external_tokens == 99
    await holder.release(handoff.lease_id)
    assert holder.load().kv_blocks_used == 0


async def test_death_ends_every_stream() -> None:
    fake = engine()
    running = asyncio.create_task(collect(fake, request(TOKENS, max_tokens=1000)))
    await until(lambda: fake.load().requests_running, within_s=10.0)
    fake.die()
    with pytest.raises(EngineDead):
        await running
    with pytest.raises(EngineDead):
        await fake.check_health()
    with pytest.raises(EngineDead):
        await collect(fake, request(TOKENS))


async def test_an_end_of_sequence_token_stops_unless_told_otherwise() -> None:
    third = tokens_of(await collect(engine(), request(TOKENS)))[2]
    fake = engine(eos_token_id=third)
    stopped = await collect(fake, request(TOKENS, ignore_eos=False))
    assert stopped[-1].finish == Finish("stop")
    assert len(tokens_of(await collect(fake, request(TOKENS)))) == 8
