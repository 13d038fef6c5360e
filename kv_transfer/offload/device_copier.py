"""Copies KV blocks between an engine's memory and a slab on the same device. Checks nothing."""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from kv_transfer.stores.gpu_direct import Slab


class DeviceCopier(OffloadingWorker):
    """Copies in the engine's own stream, so after the step that wrote a block and before the one that reads it."""

    def __init__(self, kv_caches: CanonicalKVCaches, slab: Slab) -> None:
        self._groups = kv_caches.group_data_refs
        self._engine = [each.tensor for each in kv_caches.tensors]
        self._slab, start = list[torch.Tensor](), 0
        for each in kv_caches.tensors:
            self._slab.append(slab.rows[:, start : start + each.page_size_bytes])
            start += each.page_size_bytes
        self._under_way: dict[int, tuple[int, torch.cuda.Event | None]] = {}

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """From the engine to the slab."""
        self._copy(job_id, self._engine, self._slab, src_spec, dst_spec, to_engine=False)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """From the slab to the engine."""
        self._copy(job_id, self._slab, self._engine, dst_spec, src_spec, to_engine=True)
        return True

    def get_finished(self) -> list[TransferResult]:
        """What was copied since the last call."""
        done = [job_id for job_id, (_, event) in self._under_way.items() if event is None or event.query()]
        return [TransferResult(job_id, True, self._under_way.pop(job_id)[0], None) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        """Until these are copied."""
        for job_id in job_ids & self._under_way.keys():
            _, event = self._under_way[job_id]
            if event is not None:
                event.synchronize()

    def shutdown(self) -> None:
        """Let go of the memory."""
        self.wait(set(self._under_way))
        self._engine.clear()
        self._slab.clear()

    def _copy(
        self,
        job_id: int,
        source: list[torch.Tensor],
        target: list[torch.Tensor],
        blocks: GPULoadStoreSpec,
        slots: LoadStoreSpec,
        *,
        to_engine: bool,
    ) -> None:
        assert isinstance(slots, CPULoadStoreSpec)
        device, start, copied = self._engine[0].device, 0, 0
        here, there = (torch.from_numpy(each.block_ids).long().to(device) for each in (blocks, slots))
        for group, size in zip(self._groups, blocks.group_sizes, strict=True):
            some = slice(start, start + size)
            of, to = (there[some], here[some]) if to_engine else (here[some], there[some])
            for ref in group if size else ():
                page = slice(0, ref.page_size_bytes)
                target[ref.tensor_idx][to, page] = source[ref.tensor_idx][of, page]
                copied += size * ref.page_size_bytes
            start += size
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._under_way[job_id] = (copied, event)
