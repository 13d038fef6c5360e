"""Checksums of blocks: equal for equal bytes, different for anything else that happens to KV."""

from __future__ import annotations

import torch

from kv_transfer.integrity.block_checksums import CHECKSUM_BYTES, KIND, PendingChecksums, block_checksums, region_view

BLOCKS, WORDS = 6, 40


def caches(seed: int = 1, layers: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BLOCKS, WORDS * 2, generator=generator) for _ in range(layers)]


def regions(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    size = WORDS * 8
    views = [
        region_view(tensors, base=t.data_ptr(), block_bytes=size, stride_bytes=size, blocks=BLOCKS) for t in tensors
    ]
    found = [view for view in views if view is not None]
    assert len(found) == len(tensors)
    return found


def sums(tensors: list[torch.Tensor], ids: list[int]) -> list[bytes]:
    raw = PendingChecksums(block_checksums(regions(tensors), ids)).ready()
    assert raw is not None
    return [raw[at : at + CHECKSUM_BYTES] for at in range(0, len(raw), CHECKSUM_BYTES)]


def test_a_copy_into_other_blocks_has_the_same_sums() -> None:
    source, target = caches(1), caches(2)
    for ours, theirs in zip(target, source, strict=True):
        ours[[5, 0, 3]] = theirs[[1, 2, 4]]
    assert sums(target, [5, 0, 3]) == sums(source, [1, 2, 4])
    assert len(set(sums(source, list(range(BLOCKS))))) == BLOCKS


def test_every_single_bit_counts() -> None:
    tensors = caches(layers=2)
    before = sums(tensors, [2])
    for tensor in tensors:
        words = tensor.view(torch.int64)
        for word in range(WORDS):
            for bit in (0, 31, 32, 62):
                words[2, word] ^= 1 << bit
                assert sums(tensors, [2]) != before
                words[2, word] ^= 1 << bit
    assert sums(tensors, [2]) == before


def test_where_the_bytes_are_counts() -> None:
    tensors = caches()
    before = sums(tensors, [2])
    swapped = [tensor.clone() for tensor in tensors]
    swapped[0][2], swapped[1][2] = tensors[1][2], tensors[0][2]
    assert sums(swapped, [2]) != before
    moved = [tensor.clone() for tensor in tensors]
    moved[0][2] = tensors[0][2].roll(2)
    assert sums(moved, [2]) != before


def test_the_sums_are_the_same_in_every_process() -> None:
    """What two engines compare must not depend on either: change ``KIND`` with the algorithm."""
    tensors = [torch.arange(BLOCKS * WORDS * 2, dtype=torch.float32).view(BLOCKS, -1)]
    assert (KIND, sums(tensors, [3])[0].hex()) == ("mul64-1", "000056150b9eddfd")


def test_a_region_with_gaps_between_its_blocks_is_found_and_only_its_bytes_count() -> None:
    backing = torch.randn(BLOCKS, 2, WORDS * 2)
    view = region_view(
        [backing],
        base=backing[0, 1].data_ptr(),
        block_bytes=WORDS * 8,
        stride_bytes=2 * WORDS * 8,
        blocks=BLOCKS,
    )
    assert view is not None
    assert torch.equal(view.view(torch.float32), backing[:, 1])
    before = PendingChecksums(block_checksums([view], [0, 5])).ready()
    backing[:, 0] = 0.0
    assert PendingChecksums(block_checksums([view], [0, 5])).ready() == before


def test_memory_outside_the_tensors_or_of_no_whole_words_has_no_view() -> None:
    (tensor,) = caches(layers=1)
    size = WORDS * 8
    for base, length in (
        (tensor.data_ptr() + size, size),
        (tensor.data_ptr() - 8, size),
        (tensor.data_ptr(), size - 4),
    ):
        assert region_view([tensor], base=base, block_bytes=length, stride_bytes=length, blocks=BLOCKS) is None
