"""Blocks go to host memory and come back with their checksums; a bit that changed on the way is told. No engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec

from kv_transfer.offload.checked_copier import CheckedCopier
from kv_transfer.offload.device_copier import DeviceCopier
from kv_transfer.offload.host_copier import HostCopier
from kv_transfer.offload.messages import Slots

BLOCKS, SLOTS, PAGE = 8, 4, 64


class Region:
    """Host memory as vLLM's region gives it out: the rows of all tensors stand beside one another."""

    def __init__(self, tensors: int) -> None:
        self.memory = torch.zeros(SLOTS, tensors * PAGE, dtype=torch.int8)
        self.given = 0

    def create_next_worker_view(self, size: int) -> torch.Tensor:
        view = self.memory[:, self.given : self.given + size]
        self.given += size
        return view

    def cleanup(self) -> None:
        self.given = 0


class Rig:
    """An engine with two cache groups, of two layers and of one."""

    def __init__(self, where: str) -> None:
        torch.manual_seed(0)
        self.tensors = [torch.randint(-128, 127, (BLOCKS, PAGE), dtype=torch.int8) for _ in range(3)]
        refs = [[CanonicalKVCacheRef(0, PAGE), CanonicalKVCacheRef(1, PAGE)], [CanonicalKVCacheRef(2, PAGE - 8)]]
        caches = CanonicalKVCaches([CanonicalKVCacheTensor(tensor, PAGE) for tensor in self.tensors], refs)
        self.region = Region(3)
        region: Any = self.region
        slab: Any = SimpleNamespace(rows=self.region.memory)
        inner = HostCopier(caches, region) if where == "host" else DeviceCopier(caches, slab)
        self.copier = CheckedCopier(inner, caches, rank=1)

    def store(self, blocks: tuple[list[int], list[int]], slots: list[int]) -> dict[int, bytes]:
        assert self.copier.submit_store(1, of(blocks), Slots(slots, ()))
        (result,) = self.copier.get_finished()
        assert result.success and result.job_id == 1
        return self.copier.take_stored()

    def load(self, blocks: tuple[list[int], list[int]], sums: dict[int, bytes]) -> bool:
        expected = [{1: checksum, 0: b"of another rank"} for checksum in sums.values()]
        assert self.copier.submit_load(2, Slots(list(sums), expected), of(blocks))
        (result,) = self.copier.get_finished()
        return result.success


@pytest.fixture(params=["host", "device"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def of(blocks: tuple[list[int], list[int]]) -> GPULoadStoreSpec:
    return GPULoadStoreSpec([*blocks[0], *blocks[1]], [len(each) for each in blocks], [0, 0])


def test_what_was_stored_comes_back_to_other_blocks(rig: Rig) -> None:
    before = [tensor.clone() for tensor in rig.tensors]
    sums = rig.store(([1, 3], [5]), [2, 0, 3])
    assert list(sums) == [2, 0, 3]
    assert rig.load(([6, 7], [0]), sums)
    for layer in (0, 1):
        assert torch.equal(rig.tensors[layer][6], before[layer][1])
        assert torch.equal(rig.tensors[layer][7], before[layer][3])
    # What pads a row is no KV.
    assert torch.equal(rig.tensors[2][0][: PAGE - 8], before[2][5][: PAGE - 8])
    assert rig.copier.take_corrupt() == set()


@pytest.mark.parametrize("byte", [0, PAGE - 1, PAGE, 2 * PAGE - 1])
def test_a_bit_that_changed_in_host_memory_is_told_with_its_slot(rig: Rig, byte: int) -> None:
    sums = rig.store(([1, 3], []), [2, 0])
    rig.region.memory[0, byte] ^= 1
    assert not rig.load(([6, 7], []), sums)
    assert rig.copier.take_corrupt() == {0}
    assert rig.copier.take_corrupt() == set()


def test_a_block_in_the_slot_of_another_is_told(rig: Rig) -> None:
    sums = rig.store(([1, 3], []), [2, 0])
    assert not rig.load(([6, 7], []), {2: sums[0], 0: sums[2]})
    assert rig.copier.take_corrupt() == {0, 2}


def test_a_block_without_a_checksum_of_this_rank_is_not_used(rig: Rig) -> None:
    sums = rig.store(([1], []), [2])
    assert rig.copier.submit_load(2, Slots([2], [{0: sums[2]}]), of(([6], [])))
    assert [result.success for result in rig.copier.get_finished()] == [False]


def test_a_model_whose_kv_is_not_whole_words_is_refused() -> None:
    tensor = torch.zeros(2, 12, dtype=torch.int8)
    caches = CanonicalKVCaches([CanonicalKVCacheTensor(tensor, 12)], [[CanonicalKVCacheRef(0, 12)]])
    inner: Any = None
    with pytest.raises(ValueError, match=r"kv\.tiers: this model can have none: 12 bytes"):
        CheckedCopier(inner, caches, rank=0)
