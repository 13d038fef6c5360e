"""The fake engine keeps its books: blocks, leases, hand-offs and a clock that may be virtual."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from engine.config import EngineConfig, FakeEngineConfig
from engine.epoch import EPOCH_MIN_VARIABLE, next_epoch
from engine.fake.engine import FakeEngine
from engine.fake.fabric import FakeKvFabric
from engine.protocol import EngineDead, EngineOutput, EngineRequest, Finish, Hold, TakeOver
from kv_transfer.handoff.handoff import KvHandoff

TOKENS = list(range(3, 103))


def engine(worker_id: str = "p0", fabric: FakeKvFabric | None = None, **fake: float) -> FakeEngine:
    config = EngineConfig(kind="fake", fake=FakeEngineConfig(**fake))  # type: ignore[arg-type]
    return FakeEngine(config, worker_id=worker_id, epoch=1, fabric=fabric or FakeKvFabric())


def request(
    request_id: str, tokens: list[int], transfer: Hold | TakeOver | None = None, **sampling: object
) -> EngineRequest:
    values = {"temperature": 0.0, "max_tokens": 8} | sampling
    return EngineRequest(
        request_id=request_id, token_ids=tokens, sampling=msgspec.msgpack.encode(values), transfer=transfer
    )


async def collect(fake: FakeEngine, wanted: EngineRequest) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    await fake.generate(wanted, outputs.append)
    return outputs


async def started(fake: FakeEngine, wanted: EngineRequest) -> asyncio.Task[None]:
    """A generation that has given out its first output."""
    first = asyncio.Event()
    running = asyncio.create_task(fake.generate(wanted, lambda output: first.set()))
    await asyncio.wait_for(first.wait(), 5.0)
    return running


async def held(fake: FakeEngine, request_id: str = "1") -> KvHandoff:
    """The hand-off of a prompt that was just computed."""
    handoff = (await collect(fake, request(request_id, TOKENS, Hold(60.0), max_tokens=1)))[-1].handoff
    assert handoff is not None
    return handoff


def external_tokens(outputs: list[EngineOutput]) -> int:
    assert outputs[0].first is not None
    return outputs[0].first.external_tokens


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


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


async def test_the_seed_matters_only_when_sampling() -> None:
    greedy = tokens_of(await collect(engine(), request("1", TOKENS)))
    assert greedy == tokens_of(await collect(engine(), request("2", TOKENS, seed=5)))
    sampled = tokens_of(await collect(engine(), request("3", TOKENS, seed=5, temperature=1.0)))
    assert sampled != tokens_of(await collect(engine(), request("4", TOKENS, seed=6, temperature=1.0)))


async def test_what_does_not_fit_waits_for_blocks() -> None:
    fake = engine(kv_blocks_total=5)
    outputs = await asyncio.gather(*(collect(fake, request(str(n), [3 + n, *TOKENS])) for n in range(3)))
    assert all(len(tokens_of(each)) == 8 for each in outputs)
    assert fake.load().kv_blocks_used == 0


async def test_a_full_cache_starts_the_latest_arrival_over_without_losing_tokens() -> None:
    fake = engine(kv_blocks_total=4)
    alone = [tokens_of(await collect(engine(), request(str(n), [3 + n] * 30, max_tokens=40))) for n in range(2)]
    both = await asyncio.gather(*(collect(fake, request(str(n), [3 + n] * 30, max_tokens=40)) for n in range(2)))
    assert [tokens_of(outputs) for outputs in both] == alone
    assert fake.load().kv_blocks_used == 0


async def test_another_prompts_handoff_is_an_error_not_an_answer() -> None:
    fabric = FakeKvFabric()
    prefill, decode = engine("p0", fabric), engine("d0", fabric)
    handoff = await held(prefill)
    outputs = await collect(decode, request("2", TOKENS[::-1], TakeOver(handoff)))
    assert outputs[-1].finish == Finish("error")
    assert decode.load().kv_blocks_used == 0


async def test_a_handoff_from_another_process_is_trusted() -> None:
    prefill, decode = engine("p0", FakeKvFabric()), engine("d0", FakeKvFabric())
    handoff = await held(prefill)
    outputs = await collect(decode, request("2", TOKENS, TakeOver(handoff)))
    assert external_tokens(outputs) == 99
    await prefill.release(handoff.lease_id)
    assert prefill.load().kv_blocks_used == 0


async def test_death_ends_every_stream() -> None:
    fake = engine()
    running = await started(fake, request("1", TOKENS, max_tokens=1000))
    fake.die()
    with pytest.raises(EngineDead):
        await running
    with pytest.raises(EngineDead):
        await fake.check_health()
    with pytest.raises(EngineDead):
        await collect(fake, request("2", TOKENS))


async def test_an_end_of_sequence_token_stops_unless_told_otherwise() -> None:
    third = tokens_of(await collect(engine(), request("1", TOKENS)))[2]
    fake = engine(eos_token_id=third)
    stopped = await collect(fake, request("2", TOKENS))
    assert stopped[-1].finish == Finish("stop")
    assert len(tokens_of(await collect(fake, request("3", TOKENS, ignore_eos=True)))) == 8
