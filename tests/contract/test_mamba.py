"""A model with Mamba layers: its prefill leaves off the last token of the prompt, and decode computes what follows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine.config import EngineConfig
from engine.protocol import Hold, TakeOver
from tests.contract import tiny_model
from tests.contract.conftest import Pair, pair_of
from tests.contract.test_engine_contract import prompt
from tests.support.engines import collect, first_of, request, tokens_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


def save(folder: Path) -> None:
    """Attention and Mamba side by side in each layer, with random weights."""
    import torch
    from transformers import FalconH1Config, FalconH1ForCausalLM

    torch.manual_seed(3)
    config = FalconH1Config(
        vocab_size=tiny_model.VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_d_conv=4,
        mamba_chunk_size=256, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    FalconH1ForCausalLM(config).float().save_pretrained(folder)
    tiny_model.save_tokenizer(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    folder = tmp_path_factory.mktemp("mamba")
    save(folder)
    config = EngineConfig(
        model=str(folder), max_model_len=256, max_num_seqs=8, dtype="float32", kv_cache_bytes=64 << 20
    )
    async with pair_of(config) as started:
        yield started


async def test_a_prefill_shows_no_token_and_decode_goes_on_as_one_engine_would(pair: Pair) -> None:
    assert pair.prefill.info.prefill_backoff_tokens == pair.decode.info.prefill_backoff_tokens == 1
    assert pair.prefill.info.layout_fingerprint == pair.decode.info.layout_fingerprint
    assert vars(pair.prefill)["_facts"]["layout"], "what NIXL would compare is in it"
    # vLLM 0.32 computes no more than one chunk of a Mamba layer in a step on CPU, and a chunk ends with a block.
    for length in (1, 2, 9, 31, 32):
        tokens = prompt(length)
        # The token that follows on less than the prompt may even be one that ends an output.
        held = await collect(
            pair.prefill, request(tokens, Hold(lease_s=60.0), max_tokens=1, ignore_eos=length % 2 == 0)
        )
        handoff = held[-1].handoff
        assert handoff is not None and tokens_of(held) == []
        assert handoff.tokens == max(length - 1, 1)
        moved = await collect(pair.decode, request(tokens, TakeOver(handoff)))
        assert first_of(moved).external_tokens == length - 1
        assert tokens_of(moved) == tokens_of(await collect(pair.prefill, request(tokens))), length
        await pair.prefill.release(handoff.lease_id)
    assert pair.decode.load().pull_failures == 0
