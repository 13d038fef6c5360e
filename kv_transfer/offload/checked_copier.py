"""Puts checksums around what copies KV blocks to and from the host tier. Copies nothing itself.

A block's checksum is computed where the engine holds it, before it is stored, and again after it was loaded, on the
engine's device. So it covers every copy and all memory between.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from kv_transfer.integrity.block_checksums import CHECKSUM_BYTES, PendingChecksums, block_checksums
from kv_transfer.offload.messages import Slots

_WORD_BYTES = 8


class _Job(msgspec.Struct, gc=False):
    slots: list[int]
    # Of a store from its beginning; of a load once it has come.
    sums: PendingChecksums | None = None
    # Of a load: what was stored.
    expected: Sequence[bytes | None] | None = None
    blocks: GPULoadStoreSpec | None = None
    result: TransferResult | None = None


class CheckedCopier(OffloadingWorker):
    """``inner`` copies. A job is finished when it is copied and its checksums are known."""

    def __init__(self, inner: OffloadingWorker, kv_caches: CanonicalKVCaches, rank: int) -> None:
        self._inner = inner
        self._rank = rank
        tensors = [_words(each.tensor) for each in kv_caches.tensors]
        for ref in (ref for group in kv_caches.group_data_refs for ref in group):
            _whole_words(ref.page_size_bytes)
        self._groups = [
            [tensors[ref.tensor_idx][:, : ref.page_size_bytes // _WORD_BYTES] for ref in group]
            for group in kv_caches.group_data_refs
        ]
        self._jobs: dict[int, _Job] = {}
        self._stored: dict[int, bytes] = {}
        self._corrupt: set[int] = set()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Compute the checksums of what is stored, and store it."""
        assert isinstance(dst_spec, CPULoadStoreSpec)
        self._jobs[job_id] = _Job(dst_spec.block_ids.tolist(), sums=self._checksums(src_spec))
        return self._inner.submit_store(job_id, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Load, to compare when it has come."""
        assert isinstance(src_spec, Slots)
        expected = [sums.get(self._rank) for sums in src_spec.sums]
        self._jobs[job_id] = _Job(src_spec.block_ids.tolist(), expected=expected, blocks=dst_spec)
        return self._inner.submit_load(job_id, src_spec, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        """Jobs that are copied and checked. A load that brought wrong content has not succeeded."""
        for result in self._inner.get_finished():
            job = self._jobs[result.job_id]
            job.result = result
            if job.blocks is not None:
                job.sums = self._checksums(job.blocks)
        return [result for job_id in list(self._jobs) if (result := self._checked(job_id)) is not None]

    def take_stored(self) -> dict[int, bytes]:
        """The checksums of what was written since the last call, by slot."""
        stored, self._stored = self._stored, {}
        return stored

    def take_corrupt(self) -> set[int]:
        """Slots that did not hold what was written, found since the last call."""
        corrupt, self._corrupt = self._corrupt, set()
        return corrupt

    def wait(self, job_ids: set[int]) -> None:
        """Until these are copied."""
        self._inner.wait(job_ids)

    def shutdown(self) -> None:
        """Let go of the memory."""
        self._groups.clear()
        self._inner.shutdown()

    def _checked(self, job_id: int) -> TransferResult | None:
        job = self._jobs[job_id]
        if job.result is None or job.sums is None or (raw := job.sums.ready()) is None:
            return None
        del self._jobs[job_id]
        sums = [raw[start : start + CHECKSUM_BYTES] for start in range(0, len(raw), CHECKSUM_BYTES)]
        result = job.result
        if job.expected is None:
            self._stored.update(zip(job.slots, sums, strict=True))
            return result
        wrong = {slot for slot, ours, was in zip(job.slots, sums, job.expected, strict=True) if ours != was}
        self._corrupt |= wrong
        return TransferResult(job_id, result.success and not wrong, result.transfer_size, result.transfer_time)

    def _checksums(self, blocks: GPULoadStoreSpec) -> PendingChecksums:
        ids, start, parts = blocks.block_ids.tolist(), 0, []
        for group, size in zip(self._groups, blocks.group_sizes, strict=True):
            if size:
                parts.append(block_checksums(group, ids[start : start + size]))
            start += size
        return PendingChecksums(torch.cat(parts))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """``[blocks, words]`` over a ``[blocks, bytes]`` tensor."""
    blocks, size = tensor.shape
    stride, offset = tensor.stride(0), tensor.storage_offset()
    shape, strides = (blocks, _whole_words(size)), (_whole_words(stride), 1)
    words = torch.empty(0, dtype=torch.int64, device=tensor.device)
    return words.set_(tensor.untyped_storage(), _whole_words(offset), shape, strides)


def _whole_words(size_bytes: int) -> int:
    if size_bytes % _WORD_BYTES:
        raise ValueError(f"kv.tiers: this model can have none: {size_bytes} bytes of its KV are not whole words")
    return size_bytes // _WORD_BYTES
