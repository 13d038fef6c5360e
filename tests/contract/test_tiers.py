"""The host tier under real engines: what left their memory is loaded, and what changed meanwhile is not used."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from cli.app import main
from engine import factory
from engine.config import EngineConfig
from engine.protocol import Engine, EngineError, TakeOver
from kv_transfer.prefix.block_keys import prompt_keys, unpack
from kv_transfer.prefix.events import Medium
from kv_transfer.stores.bucket import Bucket
from kv_transfer.stores.verify import corrupt_in_file
from kv_transfer.tiers.config import parse
from kv_transfer.tiers.segment import INDEX_BYTES, SUFFIX
from kv_transfer.tiers.status import TierStatus
from tests.contract import tiny_model
from tests.contract.conftest import Pair
from tests.contract.test_engine_contract import settles
from tests.kv_transfer.stores.s3_server import CREDENTIALS, REGION, s3_server
from tests.support.engines import collect, first_of, prefill, request, tokens_of
from tests.support.polling import until
from worker.kv_events.event_order import EventOrder
from worker.kv_events.mirror import BlockMirror

pytestmark = pytest.mark.asyncio(loop_scope="session")

TIERS = parse(("host:8MiB",))
BLOCK_TOKENS = 32
PROMPT_TOKENS = 600
BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
SETTLE_S = 5.0
HEARS_S = 15.0
KILLS = int(os.environ.get("BATON_TEST_ENGINE_KILLS", "1"))
Start = Callable[..., Awaitable[Engine]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """Two engines whose own memory holds two prompts, and whose host tier holds seven."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save(folder)
    config = EngineConfig(
        model=str(folder),
        max_model_len=tiny_model.CONTEXT_TOKENS,
        max_num_seqs=4,
        dtype="float32",
        kv_cache_bytes=3 << 20,
    )
    engines = await asyncio.gather(
        factory.start(config, worker_id="tier-p", role="prefill", tiers=TIERS),
        factory.start(config, worker_id="tier-d", role="decode", tiers=TIERS),
    )
    yield Pair(*engines)
    await asyncio.gather(*(engine.close() for engine in engines))


def prompt(tokens: int = PROMPT_TOKENS) -> list[int]:
    return [random.randrange(2, tiny_model.VOCAB_SIZE) for _ in range(tokens)]


def tiers_of(engine: Engine) -> dict[str, TierStatus]:
    return {tier.name: tier for tier in engine.load().tiers}


def tier_of(engine: Engine) -> TierStatus:
    return tiers_of(engine)["host"]


async def evict(engine: Engine) -> None:
    """Fill the engine's own memory with other prompts."""
    for _ in range(3):
        await collect(engine, request(prompt(), max_tokens=1))


def host_memory(worker_id: str) -> Iterator[Path]:
    """The files that are the host tier of an engine. They have no name any more, but the process that opened them."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if f"vllm_offload_{worker_id}-" in str(descriptor.readlink()):
                yield descriptor
        except OSError:
            continue


def kill(worker_id: str) -> None:
    """With no chance to clean up: the process that runs the model, which holds the tiers."""
    holder, *_ = host_memory(worker_id)
    os.kill(int(holder.parts[2]), signal.SIGKILL)


def flip_a_bit_of_every_block(engine: Engine, worker_id: str) -> None:
    file, *_ = host_memory(worker_id)
    with file.open("r+b") as memory:
        for start in range(0, file.stat().st_size, engine.info.block_bytes):
            memory.seek(start + 1000)
            byte = memory.read(1)[0]
            memory.seek(start + 1000)
            memory.write(bytes([byte ^ 1]))


async def test_a_prompt_that_left_the_engines_memory_is_loaded_and_gives_the_same_tokens(pair: Pair) -> None:
    tokens, engine = prompt(), pair.decode
    first = await collect(engine, request(tokens))
    assert first_of(first).external_tokens == 0
    await evict(engine)
    hits = tier_of(engine).hits
    again = await collect(engine, request(tokens))
    assert (first_of(again).cached_tokens, first_of(again).external_tokens) == (0, BLOCKS * BLOCK_TOKENS)
    assert tokens_of(again) == tokens_of(first)
    await until(lambda: tier_of(engine).hits == hits + BLOCKS, within_s=SETTLE_S)
    assert tier_of(engine).corrupt == 0


async def test_the_next_turn_of_a_conversation_finds_the_output_of_this_one(pair: Pair) -> None:
    tokens, engine = prompt(), pair.decode
    turn = [*tokens, *tokens_of(await collect(engine, request(tokens, max_tokens=60))), *prompt(20)]
    alone = tokens_of(await collect(pair.prefill, request(turn)))
    await evict(engine)
    outputs = await collect(engine, request(turn))
    assert first_of(outputs).external_tokens == (PROMPT_TOKENS + 59) // BLOCK_TOKENS * BLOCK_TOKENS
    assert tokens_of(outputs) == alone


async def test_a_flipped_bit_is_found_and_counted_and_the_prompt_is_computed(pair: Pair) -> None:
    tokens, engine = prompt(), pair.decode
    first = tokens_of(await collect(engine, request(tokens)))
    await evict(engine)
    before = tier_of(engine)
    flip_a_bit_of_every_block(engine, "tier-d")
    outputs = await collect(engine, request(tokens))
    assert tokens_of(outputs) == first
    await until(lambda: tier_of(engine).corrupt == before.corrupt + BLOCKS, within_s=SETTLE_S)
    assert tier_of(engine).hits == before.hits
    # What was computed is stored again, and is right.
    await evict(engine)
    again = await collect(engine, request(tokens))
    assert tokens_of(again) == first
    assert first_of(again).external_tokens == BLOCKS * BLOCK_TOKENS


async def test_the_worker_hears_that_a_prompt_lies_in_host_memory_alone(pair: Pair) -> None:
    tokens, engine = prompt(), pair.decode
    mirror = BlockMirror(epoch=1, block_size_tokens=BLOCK_TOKENS, blocks_max=10_000)
    assert engine.report_blocks(EventOrder(mirror))
    await collect(engine, request(tokens))
    await evict(engine)
    keys = set(unpack(prompt_keys(tokens, BLOCK_TOKENS)))

    def is_told() -> bool:
        mirror.snapshot()
        return keys <= set(unpack(mirror.take(10_000).levels.get(Medium.HOST, b"")))

    await until(is_told, within_s=SETTLE_S)


async def test_a_prompt_of_another_salt_finds_nothing(pair: Pair) -> None:
    tokens, engine = prompt(), pair.decode
    first = request(tokens)
    await collect(engine, first)
    await evict(engine)
    salted = msgspec.structs.replace(request(tokens), cache_salt="another")
    assert first_of(await collect(engine, salted)).external_tokens == 0


async def test_a_hand_off_is_pulled_and_proved_beside_the_tier_and_is_not_stored_twice(pair: Pair) -> None:
    tokens = prompt()
    before = tier_of(pair.decode)
    checked = pair.decode.load().pulls_checked
    taken, handoff = await prefill(pair.prefill, tokens)
    outputs = await collect(pair.decode, request([*tokens, *taken], TakeOver(handoff)))
    assert first_of(outputs).external_tokens == PROMPT_TOKENS
    assert pair.decode.load().pulls_checked == checked + 1
    assert await settles(pair.prefill)
    after = tier_of(pair.decode)
    assert (after.stored, after.hits, after.misses) == (before.stored, before.hits, before.misses)
    # The prefill engine has stored it, and its next turn finds it there.
    await evict(pair.prefill)
    again, second = await prefill(pair.prefill, tokens)
    assert again == taken
    assert tier_of(pair.prefill).hits >= BLOCKS
    await pair.prefill.release(second.lease_id)


@pytest_asyncio.fixture(loop_scope="session")
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts engines with a host tier of three prompts each, and one file tier of fourteen together."""
    tiny_model.save(tmp_path)
    (tmp_path / "kv").mkdir()
    started: list[Engine] = []

    async def one(worker_id: str, store: str = "", **settings: Any) -> Engine:
        tiers = parse(("host:4MiB", store or f"file:{tmp_path / 'kv'}:16MiB"))
        config = EngineConfig(
            model=str(tmp_path),
            max_model_len=tiny_model.CONTEXT_TOKENS,
            dtype="float32",
            kv_cache_bytes=3 << 20,
            **{"max_num_seqs": 4} | settings,
        )
        engine = await factory.start(config, worker_id=worker_id, role="decode", tiers=tiers)
        started.append(engine)
        return engine

    yield one
    await asyncio.gather(*(engine.close() for engine in started))


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "kv").rglob(f"*{SUFFIX}"))


def corrupt(folder: Path) -> list[bytes]:
    return [key for path in segments(folder) for key in corrupt_in_file(path)]


def has_new_segments(folder: Path, known: set[Path], more_than: int) -> bool:
    """A full folder has as many as before."""
    return len(set(segments(folder)) - known) > more_than


def found_corrupt(engine: Engine) -> int:
    return sum(tier.corrupt for tier in engine.load().tiers)


def found_more_corrupt(engine: Engine, than: int) -> bool:
    return found_corrupt(engine) > than


async def written(engine: Engine, tokens: list[int], store: str = "file") -> list[int]:
    """What the engine answers to a prompt that it was asked twice, so that it lies in a store now."""
    first = tokens_of(await collect(engine, request(tokens)))
    stored = tiers_of(engine)[store].stored
    assert tokens_of(await collect(engine, request(tokens))) == first
    await tells(engine, lambda: tiers_of(engine)[store].stored >= stored + BLOCKS, within_s=SETTLE_S)
    return first


async def tells(engine: Engine, holds: Callable[[], bool], *, within_s: float) -> None:
    """Until it holds. An engine that rests looks at its stores when it is asked something."""
    async with asyncio.timeout(within_s):
        while not holds():
            await engine.ping()
            await asyncio.sleep(0.05)


async def heard(engine: Engine, blocks: int, store: str = "file") -> None:
    """Until the engine knows of so many blocks in a store."""
    await tells(engine, lambda: tiers_of(engine)[store].blocks >= blocks, within_s=HEARS_S)


async def test_what_one_worker_stored_another_loads_after_the_first_was_killed_and_after_both_restart(
    start: Start, tmp_path: Path
) -> None:
    tokens, (ours, theirs) = prompt(), await asyncio.gather(start("tier-a"), start("tier-b"))
    first = await written(ours, tokens)
    assert corrupt(tmp_path) == []
    await heard(theirs, BLOCKS)
    kill("tier-a")
    await ours.close()
    outputs = await collect(theirs, request(tokens))
    assert tokens_of(outputs) == first
    assert first_of(outputs).external_tokens == BLOCKS * BLOCK_TOKENS
    status = tiers_of(theirs)
    assert (status["file"].hits, status["file"].corrupt, status["host"].corrupt) == (BLOCKS, 0, 0)
    kill("tier-b")
    await theirs.close()
    again = await start("tier-a")
    outputs = await collect(again, request(tokens))
    assert tokens_of(outputs) == first
    assert first_of(outputs).external_tokens == BLOCKS * BLOCK_TOKENS


async def test_a_request_that_waits_its_turn_has_its_blocks_read_meanwhile(start: Start) -> None:
    tokens, (ours, theirs) = prompt(), await asyncio.gather(start("tier-a"), start("tier-b", max_num_seqs=1))
    first = await written(ours, tokens)
    await heard(theirs, BLOCKS)
    running = asyncio.create_task(collect(theirs, request(prompt(40), max_tokens=900)))
    waiting = asyncio.create_task(collect(theirs, request(tokens)))
    await until(lambda: tiers_of(theirs)["file"].hits >= 16, within_s=SETTLE_S)
    # A quarter of the host tier.
    assert (tiers_of(theirs)["file"].ahead, running.done()) == (16, False)
    outputs = await waiting
    assert running.done()
    assert (tokens_of(outputs), first_of(outputs).external_tokens) == (first, BLOCKS * BLOCK_TOKENS)
    assert tiers_of(theirs)["file"].ahead_unused == 0


async def test_what_one_worker_put_into_a_bucket_another_loads_and_a_cut_object_gives_no_wrong_token(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server("kv-bucket") as address:
        place = f"kv-bucket/some/prefix:16MiB,endpoint={address},region={REGION}"
        ours, theirs = await asyncio.gather(start("tier-s", f"s3://{place}"), start("tier-t", f"s3://{place}"))
        tokens, spoilt = prompt(), prompt()
        first, right = await written(ours, tokens, "s3"), await written(ours, spoilt, "s3")
        await heard(theirs, 2 * BLOCKS, "s3")
        kill("tier-s")
        await ours.close()
        outputs = await collect(theirs, request(tokens))
        assert tokens_of(outputs) == first
        assert first_of(outputs).external_tokens == BLOCKS * BLOCK_TOKENS
        assert tiers_of(theirs)["s3"].hits == BLOCKS
        kill("tier-t")
        await theirs.close()
        again = await start("tier-s", f"s3://{place}")
        await heard(again, 2 * BLOCKS, "s3")
        outputs = await collect(again, request(tokens))
        assert tokens_of(outputs) == first
        assert first_of(outputs).external_tokens == BLOCKS * BLOCK_TOKENS
        # NIXL reads a cut object as far as it goes, and says that all is well.
        bucket = Bucket(parse(("host:1MiB", f"s3://{place}"))[1])
        (fingerprint,) = bucket.folders()
        for name, size in list(bucket.listed(f"{fingerprint}/0")):
            bucket.put(f"{fingerprint}/0/{name}", bytes(bucket.whole(f"{fingerprint}/0/{name}"))[: size // 2])
        assert tokens_of(await collect(again, request(spoilt))) == right
        await tells(again, functools.partial(found_more_corrupt, again, 0), within_s=SETTLE_S)
    # Without its server the tier is off, and the engine goes on.
    assert tokens_of(await collect(again, request(tokens, max_tokens=4))) == first[:4]


async def test_what_is_encrypted_is_loaded_with_its_key_alone_and_what_was_changed_gives_no_wrong_token(
    start: Start, tmp_path: Path
) -> None:
    stores = []
    for name in ("ours", "theirs"):
        (tmp_path / name).write_text(random.randbytes(32).hex())
        (tmp_path / name).chmod(0o600)
        stores.append(f"file:{tmp_path / 'kv'}:16MiB,key_file={tmp_path / name}")
    prompts, (ours, theirs) = (
        [prompt(), prompt()],
        await asyncio.gather(start("tier-a", stores[0]), start("tier-b", stores[1])),
    )
    answers = [await written(ours, tokens) for tokens in prompts]
    await ours.close()
    assert main(["kv", "verify", "--kv-tier", "host:1MiB", "--kv-tier", stores[0]]) == 0
    outputs = await collect(theirs, request(prompts[0]))
    assert (tokens_of(outputs), first_of(outputs).external_tokens) == (answers[0], 0)
    assert tiers_of(theirs)["file"].blocks == 0
    await theirs.close()
    again = await start("tier-a", stores[0])
    outputs = await collect(again, request(prompts[0]))
    assert (tokens_of(outputs), first_of(outputs).external_tokens) == (answers[0], BLOCKS * BLOCK_TOKENS)
    for path in segments(tmp_path):
        with path.open("r+b") as file:
            for at in range(INDEX_BYTES, path.stat().st_size, 4096):
                file.seek(at)
                file.write(b"other")
    assert tokens_of(await collect(again, request(prompts[1]))) == answers[1]
    await tells(again, functools.partial(found_more_corrupt, again, 0), within_s=SETTLE_S)


async def test_segments_that_are_spoilt_or_gone_or_of_another_model_give_no_wrong_token(
    start: Start, tmp_path: Path
) -> None:
    engine = await start("tier-f")
    for how in ("flip", "cut", "gone"):
        tokens = prompt()
        before = set(segments(tmp_path))
        first = await written(engine, tokens)
        corrupt_before = found_corrupt(engine)
        for path in set(segments(tmp_path)) - before:
            content = bytearray(path.read_bytes())
            content[-5000] ^= 1
            match how:
                case "flip":
                    path.write_bytes(content)
                case "cut":
                    path.write_bytes(content[:-4096])
                case _:
                    path.unlink()
        for _ in range(2):
            await evict(engine)
        outputs = await collect(engine, request(tokens))
        assert tokens_of(outputs) == first
        # Of a flipped block the engine finds out when all are loaded: those before it are right.
        assert first_of(outputs).external_tokens == (BLOCKS - 1) * BLOCK_TOKENS * (how == "flip")
        if how != "gone":
            await tells(engine, functools.partial(found_more_corrupt, engine, corrupt_before), within_s=SETTLE_S)
            # It is removed, and never read again.
            assert set(segments(tmp_path)) == before
    tokens = prompt()
    first = await written(engine, tokens)
    await engine.close()
    assert segments(tmp_path)
    # One of the same shape.
    tiny_model.save(tmp_path, seed=1)
    other = await start("tier-f")
    outputs = await collect(other, request(tokens))
    assert first_of(outputs).external_tokens == 0
    assert tokens_of(outputs) != first
    # What the earlier model left is not kept for ever.
    assert not segments(tmp_path)


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("file:{}:4KiB", r"kv\.tiers: a file tier of 4096 bytes holds no block: one takes \d+ bytes"),
        (
            "file:{}:16MiB,gpudirect=required",
            r"kv\.tiers: .* with gpudirect=required: this engine runs on no NVIDIA GPU",
        ),
        (
            "s3://bucket/kv:16MiB,endpoint=http://127.0.0.1:9,required=true",
            r"kv\.tiers: bucket/kv cannot be used: Could not connect",
        ),
    ],
    ids=["too small", "no GPU", "no S3"],
)
async def test_a_tier_that_cannot_be_as_it_was_asked_for_is_refused_in_a_sentence(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, told: str
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        await start("tier-x", store.format(tmp_path / "kv"))
    assert not list(Path("/dev/shm").glob("*tier-x*"))


async def test_without_a_gpu_files_go_through_host_memory_where_gpudirect_is_only_wished_for(
    start: Start, tmp_path: Path
) -> None:
    engine = await start("tier-g", f"file:{tmp_path / 'kv'}:16MiB,gpudirect=true")
    tokens = prompt()
    first = await written(engine, tokens)
    for _ in range(2):
        await evict(engine)
    outputs = await collect(engine, request(tokens))
    assert (tokens_of(outputs), first_of(outputs).external_tokens) == (first, BLOCKS * BLOCK_TOKENS)


async def test_an_engine_that_is_killed_while_it_stores_leaves_whole_segments_and_no_shared_memory(
    start: Start, tmp_path: Path
) -> None:
    """Five times with ``BATON_TEST_ENGINE_KILLS=5``."""
    again, answers = prompt(), list[list[int]]()
    for _ in range(KILLS):
        engine = await start("tier-w")
        answers.append(await written(engine, again) if not answers else answers[0])
        known = set(segments(tmp_path))

        async def store(engine: Engine = engine) -> None:
            with contextlib.suppress(EngineError):
                while True:
                    tokens = prompt()
                    await collect(engine, request(tokens, max_tokens=1))
                    await collect(engine, request(tokens, max_tokens=1))

        storing = asyncio.create_task(store())
        has_stored = functools.partial(has_new_segments, tmp_path, known, random.randrange(4))
        await until(has_stored, within_s=SETTLE_S * 4)
        kill("tier-w")
        await storing
        await engine.close()
        assert not list(Path("/dev/shm").glob("*tier-w*"))
        assert not list(host_memory("tier-w"))
        assert corrupt(tmp_path) == []
    engine = await start("tier-w")
    assert tokens_of(await collect(engine, request(again))) == answers[0]
    assert main(["kv", "gc", "--kv-tier", "host:1MiB", "--kv-tier", f"file:{tmp_path / 'kv'}:16MiB"]) == 0
    assert not list(tmp_path.rglob("*.draft"))
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 16 << 20
