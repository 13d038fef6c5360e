"""What vLLM's own block pool publishes, decoded and mirrored: the keys are those that a front proxy computes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.vllm.kv_events import decode
from kv_transfer.prefix.block_keys import Media, prompt_keys, unpack
from kv_transfer.prefix.events import GONE, BlocksRemoved, BlocksStored, Medium
from worker.kv_events.mirror import BlockMirror

SIZE = 16
TOKENS = list(range(100, 100 + 5 * SIZE))
IMAGE = Media("image", 20, 30)


class Pool:
    """vLLM's block pool, whose events go to a mirror as bytes."""

    def __init__(self) -> None:
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.block_pool import BlockPool

        kv_cache_utils.init_none_hash(sha256_cbor)
        self.hasher = kv_cache_utils.get_request_block_hasher(SIZE, sha256_cbor)
        self.pool = BlockPool(16, enable_caching=True, hash_block_size=SIZE, enable_kv_cache_events=True)
        self.mirror = BlockMirror(epoch=1, block_size_tokens=SIZE, blocks_max=100)
        self.mirror.take(1)

    def request(self, *, lora: str = "", salt: str = "", media: tuple[Media, ...] = ()) -> Any:
        from vllm.lora.request import LoRARequest
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        return Request(
            request_id="r",
            prompt_token_ids=TOKENS,
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            mm_features=[
                MultiModalFeatureSpec(
                    data=None,
                    modality="image",
                    identifier=each.identifier,
                    mm_position=PlaceholderRange(offset=each.offset_tokens, length=each.length_tokens),
                )
                for each in media
            ],
            lora_request=LoRARequest(lora_name=lora, lora_int_id=1, lora_path="/adapters/a") if lora else None,
            cache_salt=salt or None,
            block_hasher=self.hasher,
        )

    def told(self) -> dict[int, tuple[int, ...]]:
        """Publish what happened; what the mirror then has to say, as keys by level."""
        from vllm.distributed.kv_events import KVEventBatch

        batch = KVEventBatch(ts=1.0, events=self.pool.take_events())
        batch.data_parallel_rank = 0
        events = decode(msgspec.msgpack.encode(batch))
        assert events is not None
        self.mirror.apply(events)
        return {level: tuple(sorted(unpack(keys))) for level, keys in self.mirror.take(100).levels.items()}


@pytest.mark.parametrize("lora", ["", "adapter"])
@pytest.mark.parametrize("salt", ["", "tenant"])
@pytest.mark.parametrize("media", [(), (IMAGE, Media("next", 50, 3))])
def test_an_engine_s_blocks_have_the_keys_of_the_prompt(lora: str, salt: str, media: tuple[Media, ...]) -> None:
    keys = unpack(prompt_keys(TOKENS, SIZE, lora=lora, salt=salt, media=media))
    pool = Pool()
    request = pool.request(lora=lora, salt=salt, media=media)
    blocks = pool.pool.get_new_blocks(5)
    pool.pool.cache_full_blocks(request, blocks, 0, 2, SIZE, 0)
    assert pool.told() == {0: tuple(sorted(keys[:2]))}
    pool.pool.cache_full_blocks(request, blocks, 2, 5, SIZE, 0)
    assert pool.told() == {0: tuple(sorted(keys[2:]))}


def test_copies_evictions_and_a_reset() -> None:
    keys = unpack(prompt_keys(TOKENS, SIZE))
    pool = Pool()
    copies = [pool.pool.get_new_blocks(5) for _ in range(2)]
    for blocks in copies:
        pool.pool.cache_full_blocks(pool.request(), blocks, 0, 5, SIZE, 0)
    assert pool.told() == {0: tuple(sorted(keys))}
    for blocks in copies:
        pool.pool.free_blocks(reversed(blocks))
    # 15 blocks, 5 of them never used: five of the first copy go, then two of the second.
    taken = pool.pool.get_new_blocks(10)
    assert pool.told() == {}
    taken += pool.pool.get_new_blocks(2)
    assert pool.told() == {GONE: tuple(sorted(keys[3:]))}
    pool.pool.free_blocks(taken)
    assert pool.pool.reset_prefix_cache()
    assert pool.told() == {} and len(pool.mirror) == 0


def test_what_no_prefix_is_found_by_is_left_out() -> None:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

    def stored(medium: str, kind: str = "full_attention") -> BlockStored:
        return BlockStored(
            block_hashes=[b"h"],
            parent_block_hash=b"p",
            token_ids=TOKENS[:SIZE],
            block_size=SIZE,
            lora_id=None,
            medium=medium,
            lora_name=None,
            group_idx=1,
            kv_cache_spec_kind=kind,
        )

    events = [stored("GPU"), stored("CPU"), stored("STORAGE"), stored("GPU", "sliding_window")]
    events += [BlockRemoved(block_hashes=[b"h"], medium="CPU", group_idx=1), BlockRemoved([b"h"], "STORAGE")]
    decoded = decode(msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=events)))
    assert decoded is not None
    assert [
        (type(each), each.medium, each.group) for each in decoded if isinstance(each, BlocksStored | BlocksRemoved)
    ] == [
        (BlocksStored, Medium.HBM, 1),
        (BlocksStored, Medium.HOST, 1),
        (BlocksRemoved, Medium.HOST, 1),
    ]


def test_a_batch_that_cannot_be_read_is_none() -> None:
    assert decode(b"\x93") is None
    assert decode(msgspec.msgpack.encode([1.0, [{"type": "BlockMoved"}]])) is None
