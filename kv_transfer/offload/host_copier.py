"""Copies KV blocks between an engine on CPU and the host tier, which vLLM does for GPUs only. Checks nothing."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class HostCopier(OffloadingWorker):
    """Copies in the engine's own thread, between two steps: nothing else writes the blocks then."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._groups = kv_caches.group_data_refs
        self._engine = [_Rows(each.tensor) for each in kv_caches.tensors]
        self._host = [_Rows(region.create_next_worker_view(each.page_size_bytes)) for each in kv_caches.tensors]
        self._region = region
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """From the engine to the host."""
        self._copy(job_id, self._engine, self._host, _pairs(src_spec, dst_spec))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """From the host to the engine."""
        moves = ((group, slot, block) for group, block, slot in _pairs(dst_spec, src_spec))
        self._copy(job_id, self._host, self._engine, moves)
        return True

    def get_finished(self) -> list[TransferResult]:
        """What was copied since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def shutdown(self) -> None:
        """Let go of the memory."""
        self._engine.clear()
        self._host.clear()
        self._region.cleanup()

    def _copy(
        self, job_id: int, source: list[_Rows], target: list[_Rows], moves: Iterable[tuple[int, int, int]]
    ) -> None:
        """``moves``: the cache group of each block, its row in ``source`` and its row in ``target``."""
        started_s, copied = time.perf_counter(), 0
        for group, start, end in moves:
            for ref in self._groups[group]:
                to, of = target[ref.tensor_idx].address(end), source[ref.tensor_idx].address(start)
                ctypes.memmove(to, of, ref.page_size_bytes)
                copied += ref.page_size_bytes
        self._finished.append(TransferResult(job_id, True, copied, time.perf_counter() - started_s))


class _Rows:
    """Where each row of a tensor lies."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Keeps the memory.
        self._tensor = tensor
        self._base = tensor.data_ptr()
        self._stride = tensor.stride(0) * tensor.element_size()

    def address(self, row: int) -> int:
        return self._base + row * self._stride


def _pairs(blocks: GPULoadStoreSpec, slots: LoadStoreSpec) -> Iterator[tuple[int, int, int]]:
    """Cache group, block of the engine and slot of the host of each block: both list them in the same order."""
    assert isinstance(slots, CPULoadStoreSpec)
    groups = [group for group, size in enumerate(blocks.group_sizes) for _ in range(size)]
    return zip(groups, blocks.block_ids.tolist(), slots.block_ids.tolist(), strict=True)
