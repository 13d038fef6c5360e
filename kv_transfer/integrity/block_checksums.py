"""Checksums of KV blocks, computed on the device that holds the blocks. Only checksums leave the device.

A block's checksum is the weighted sum of its 64-bit words modulo 2^64, with odd weights, over all layers. Transfers
copy bytes, so equality is exact. One changed word always changes the checksum. Other content has the same checksum with
a chance of 2^-64. It is a checksum and no signature: two blocks with one checksum can be made on purpose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

KIND = "mul64-1"
CHECKSUM_BYTES = 8
_WORD_BYTES = 8
_WEIGHTS_SEED = 0x6261746F6E
_LAYER_FACTOR = 0x9E3779B97F4A7C15 - 2**64
# What one multiplication may need for its result.
_CHUNK_BYTES = 64 << 20


def region_view(
    tensors: Iterable[torch.Tensor], *, base: int, block_bytes: int, stride_bytes: int, blocks: int
) -> torch.Tensor | None:
    """``[blocks, words]`` int64 over the memory at address ``base``, without a copy.

    None where no tensor holds that memory, or where a block is not a whole number of words.
    """
    if block_bytes % _WORD_BYTES or stride_bytes % _WORD_BYTES or blocks < 1:
        return None
    for tensor in tensors:
        storage = tensor.untyped_storage()
        offset = base - storage.data_ptr()
        if offset < 0 or offset + (blocks - 1) * stride_bytes + block_bytes > storage.nbytes():
            continue
        if offset % _WORD_BYTES:
            return None
        return torch.empty(0, dtype=torch.int64, device=tensor.device).set_(
            storage,
            offset // _WORD_BYTES,
            (blocks, block_bytes // _WORD_BYTES),
            (stride_bytes // _WORD_BYTES, 1),
        )
    return None


def block_checksums(regions: Sequence[torch.Tensor], block_ids: Sequence[int]) -> torch.Tensor:
    """One int64 a block, on the regions' device, in the order of ``block_ids``. Asynchronous on CUDA."""
    device = regions[0].device
    if device.type == "cpu":
        return _on_cpu(regions, block_ids)
    ids = torch.tensor(block_ids, dtype=torch.int64, device=device)
    total = torch.zeros(len(block_ids), dtype=torch.int64, device=device)
    for region in regions:
        words = region.shape[1]
        weights = _weights(words, device)
        rows = max(1, _CHUNK_BYTES // (words * _WORD_BYTES))
        parts = [(region.index_select(0, chunk) * weights).sum(1) for chunk in ids.split(rows)]
        # A factor, so that the same bytes in another layer give another checksum.
        total = total * _LAYER_FACTOR + torch.cat(parts)
    return total


def _on_cpu(regions: Sequence[torch.Tensor], block_ids: Sequence[int]) -> torch.Tensor:
    """The same in one pass over the words: PyTorch's takes three, and twenty times as long."""
    total: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(len(block_ids), dtype=np.int64)
    for region in regions:
        rows, weights = region.numpy(), _weights(region.shape[1], region.device).numpy()
        total = total * np.int64(_LAYER_FACTOR) + np.array(
            [np.einsum("i,i->", rows[block], weights) for block in block_ids], dtype=np.int64
        )
    return torch.from_numpy(total)


class PendingChecksums:
    """Checksums on their way from the device to the host."""

    def __init__(self, checksums: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if checksums.device.type == "cuda":
            checksums = checksums.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._checksums = checksums

    def ready(self) -> bytes | None:
        """Little-endian, ``CHECKSUM_BYTES`` each; None while they are not on the host."""
        if self._event is not None and not self._event.query():
            return None
        raw: bytes = self._checksums.numpy().astype("<i8").tobytes()
        return raw


@functools.cache
def _weights(words: int, device: torch.device) -> torch.Tensor:
    """The same odd numbers in every process: PCG64's raw output is fixed by numpy for good."""
    raw = np.random.PCG64(_WEIGHTS_SEED).random_raw(words) | np.uint64(1)
    return torch.from_numpy(raw.view(np.int64)).to(device)
