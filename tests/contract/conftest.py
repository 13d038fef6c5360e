"""Engines for the contract suite: fake ones always, and one pair of real vLLM engines. Asserts nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from engine import factory
from engine.config import EngineConfig, FakeEngineConfig
from engine.protocol import Engine
from tests.contract import tiny_model


class Pair(NamedTuple):
    prefill: Engine
    decode: Engine


@asynccontextmanager
async def pair_of(config: EngineConfig) -> AsyncIterator[Pair]:
    prefill, decode = await asyncio.gather(
        factory.start(config, worker_id="p0", role="prefill"), factory.start(config, worker_id="d0", role="decode")
    )
    yield Pair(prefill, decode)
    await asyncio.gather(prefill.close(), decode.close())


@pytest_asyncio.fixture(scope="package", loop_scope="session", params=["fake", "vllm"])
async def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """A prefill and a decode engine of one kind, started once."""
    settings: dict[str, Any] = {}
    if request.param == "vllm":
        folder = tmp_path_factory.mktemp("model")
        tiny_model.save(folder)
        connector = {"kv_connector_module_path": "tests.contract.spoiling_connector"}
        # Ours, and it spoils the KV of requests whose id asks for it.
        settings = {"model": str(folder), "args": {"kv_transfer_config": connector}}
    config = EngineConfig(
        kind=request.param,
        max_model_len=tiny_model.CONTEXT_TOKENS,
        max_num_seqs=16,
        fake=FakeEngineConfig(vocab_size=tiny_model.VOCAB_SIZE, kv_blocks_total=1024),
        dtype="float32",
        kv_cache_bytes=64 << 20,
        **settings,
    )
    async with pair_of(config) as pair:
        yield pair
