"""What vLLM's offloading connector is given: the books of the tiers, what copies, and the folder. Decides nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.version import __version__ as vllm_version

from kv_transfer.handoff import layout
from kv_transfer.offload import private
from kv_transfer.offload.block_folder import BlockFolder, remove_unused, scan
from kv_transfer.offload.checked_copier import CheckedCopier
from kv_transfer.offload.file_tier import FileTier
from kv_transfer.offload.host_copier import HostCopier
from kv_transfer.offload.host_tier import HostTier
from kv_transfer.tiers.block_file import HEADER_BYTES, Label
from kv_transfer.tiers.cost import FadingLine, LoadJudge
from kv_transfer.tiers.file_blocks import FileBlocks
from kv_transfer.tiers.host_blocks import HostBlocks, slots_in

FILES = "baton_files"
"""Key of kv_connector_extra_config: ``Files`` as builtins."""


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """The file tier of one worker. ``model``: what tells apart models and settings whose KV differs."""

    folder: str
    capacity_bytes: int
    model: str


class HostTierSpec(CPUOffloadingSpec):
    """Stock's sizes, for a block of the engine at a time, with Baton's books and checks."""

    _tier: HostTier | None = None
    _copier: CheckedCopier | None = None
    folder: BlockFolder | None = None

    @property
    def part(self) -> int:
        """Which part of a block this rank has. Ranks that hold the same KV have the same part."""
        return 0 if self.replicated_layout else int(self.config.parallel.rank)

    def _uses_shared_region(self) -> bool:
        """On every platform: the memory has a name only while the ranks of an engine find it."""
        return True

    def get_manager(self) -> OffloadingManager:
        """The books, of the scheduler half."""
        if self._tier is None:
            tokens = {group.group_id: group.tokens_per_block for group in self.config.groups}
            with_events = self.kv_events_config.enable_kv_cache_events
            host = HostBlocks(self._slots(), self.kv_bytes_per_chunk)
            self._tier = HostTier(host, tokens, with_events=with_events, steps=FadingLine())
            if (files := self._files()) is not None:
                self._tier.files = self._file_tier(files, host, self._tier.steps)
        return self._tier

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """What copies, of a worker half. On GPUs stock copies, on streams of its own."""
        if self._copier is None:
            self._slots()
            region = private.region(self, self.part)
            if current_platform.is_cuda_alike() or current_platform.is_xpu():
                inner: OffloadingWorker = CPUOffloadingWorker(
                    kv_caches=kv_caches,
                    blocks_per_chunk=self.blocks_per_chunk,
                    num_cpu_chunks=self.num_chunks,
                    mmap_region=region,
                )
            else:
                inner = HostCopier(kv_caches, region)
            self._copier = CheckedCopier(inner, kv_caches, self.part)
            if (files := self._files()) is not None:
                self.folder = self._open_folder(files, region)
        return self._copier

    def close_folder(self) -> None:
        """End what is under way, before the memory goes."""
        if self.folder is not None:
            self.folder.close()
            self.folder = None

    def _slots(self) -> int:
        return slots_in(int(self.extra_config["cpu_bytes_to_use"]), self.kv_bytes_per_chunk)

    def _files(self) -> Files | None:
        told = self.extra_config.get(FILES)
        return None if told is None else msgspec.convert(told, Files)

    def _file_tier(self, files: Files, host: HostBlocks, steps: FadingLine) -> FileTier:
        ranks, (tokens, *_) = self.config.parallel.world_size, self.tokens_per_block
        file_bytes = HEADER_BYTES + self._part_bytes
        if files.capacity_bytes < ranks * file_bytes:
            size = f"holds no block: one has {ranks * file_bytes} bytes"
            raise ValueError(f"kv.tiers: a file tier of {files.capacity_bytes} bytes {size}")
        book = FileBlocks(files.capacity_bytes, ranks * file_bytes, tokens)
        there = [scan(self._path(files, rank), file_bytes) for rank in range(ranks)]
        whole = set(there[0]).intersection(*there[1:])
        gone = book.found(key for key in there[0] if key in whole)
        gone += [key for keys in there for key in keys if key not in whole]
        return FileTier(book, host, LoadJudge(steps), ranks=ranks, clock=time.monotonic, gone=gone)

    def _open_folder(self, files: Files, region: SharedOffloadRegion) -> BlockFolder:
        rank, ranks = self.config.parallel.rank, self.config.parallel.world_size
        fingerprint, memory = bytes.fromhex(self._fingerprint(files)), region.create_kv_memoryview().cast("B")
        first = self.part * self._part_bytes

        def label(key: bytes) -> Label:
            return Label(fingerprint=fingerprint, key=key, rank=rank, ranks=ranks)

        def row(slot: int) -> memoryview:
            start = slot * self.kv_bytes_per_chunk + first
            return memory[start : start + self._part_bytes]

        path = self._path(files, rank)
        try:
            folder = BlockFolder(path, label, row, close=memory.release)
        except BlockingIOError as error:
            raise ValueError(f"kv.tiers: {path} is used by another engine") from error
        except OSError as error:
            raise ValueError(f"kv.tiers: {path} cannot be used: {error.strerror}") from error
        if rank == 0:
            remove_unused(Path(files.folder), keep=self._fingerprint(files))
        return folder

    @property
    def _part_bytes(self) -> int:
        """Of a block, what one rank has. A whole row, which is whole pages, where there is one rank."""
        return self.kv_bytes_per_chunk if self.config.parallel.world_size == 1 else self.cpu_page_size_per_worker

    def _path(self, files: Files, rank: int) -> Path:
        return Path(files.folder, self._fingerprint(files), f"{self.config.parallel.data_parallel_index}-{rank}")

    def _fingerprint(self, files: Files) -> str:
        """Of all that must agree between the engine that wrote a block and the one that reads it."""
        config, parallel = self.config, self.config.parallel
        sizes = (parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size, parallel.world_size)
        return layout.fingerprint(
            {
                "model": files.model,
                "vllm": vllm_version,
                "dtype": config.model.dtype,
                "layers": repr(config.groups),
                "hash": f"{config.cache.tokens_per_hash} {os.environ.get('PYTHONHASHSEED', '')}",
                "block": f"{self.kv_bytes_per_chunk} {self.replicated_layout} {config.kv_cache_layout}",
                "parallel": repr(sizes),
                "device": current_platform.device_name,
            }
        )
