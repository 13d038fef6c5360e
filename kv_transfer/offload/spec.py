"""What vLLM's offloading connector is given: the books of the tiers, what copies, and the stores. Decides nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
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
from kv_transfer.offload.checked_copier import CheckedCopier
from kv_transfer.offload.host_copier import HostCopier
from kv_transfer.offload.host_tier import HostTier
from kv_transfer.stores.folder import FolderView, SegmentFolder, describe, in_use, remove_unused
from kv_transfer.stores.store import RankMemory, SegmentStore
from kv_transfer.stores.tier import StoreTier
from kv_transfer.stores.watch import StoreView, StoreWatch
from kv_transfer.tiers.config import Tier
from kv_transfer.tiers.cost import FadingLine, LoadJudge
from kv_transfer.tiers.host_blocks import HostBlocks, slots_in
from kv_transfer.tiers.segment import About, Entry, Index, segment_bytes
from kv_transfer.tiers.store_blocks import StoreBlocks

STORES = "baton_stores"
"""Key of kv_connector_extra_config: the tiers below host memory, from near to far, as builtins."""
MODEL = "baton_model"
"""Key of kv_connector_extra_config: what tells apart models and settings whose KV differs."""
# How often a store is looked at for what others wrote.
_WATCH_S = {"file": 1.0, "shared": 5.0, "s3": 10.0}


class HostTierSpec(CPUOffloadingSpec):
    """Stock's sizes, for a block of the engine at a time, with Baton's books and checks."""

    _tier: HostTier | None = None
    _copier: CheckedCopier | None = None
    _in_use: Sequence[int] = ()
    stores: Sequence[SegmentStore] = ()
    """Of a worker half, in the order of the tiers."""

    @property
    def part(self) -> int:
        """Which part of a block this rank has. Ranks that hold the same KV have the same part."""
        return 0 if self.replicated_layout else int(self.config.parallel.rank)

    @property
    def parts(self) -> int:
        """Parts that a block has."""
        return 1 if self.replicated_layout else int(self.config.parallel.world_size)

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
            self._tier.stores = [self._store_tier(tier, host, self._tier.steps) for tier in self._tiers()]
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
            # Where all ranks have the same, the first one writes and reads it.
            if self.config.parallel.rank < self.parts:
                self.stores = [self._store(tier, kv_caches, region) for tier in self._tiers()]
        return self._copier

    def close_stores(self) -> None:
        """End what is under way, before the memory goes."""
        for store in self.stores:
            store.close()
        self.stores = ()

    def _slots(self) -> int:
        return slots_in(int(self.extra_config["cpu_bytes_to_use"]), self.kv_bytes_per_chunk)

    def _tiers(self) -> list[Tier]:
        return msgspec.convert(self.extra_config.get(STORES, []), list[Tier])

    def _store_tier(self, tier: Tier, host: HostBlocks, steps: FadingLine) -> StoreTier:
        tokens, *_ = self.tokens_per_block
        smallest = self.parts * segment_bytes(1, self._part_bytes)
        if tier.capacity_bytes < smallest:
            size = f"holds no block: one takes {smallest} bytes"
            raise ValueError(f"kv.tiers: a {tier.kind} tier of {tier.capacity_bytes} bytes {size}")
        fingerprint, about = self._fingerprint(), self._about()
        if tier.kind == "file":
            folder = Path(tier.place, fingerprint)
            with _naming(tier):
                self._in_use = [*self._in_use, in_use(folder)]
                remove_unused(Path(tier.place))
                describe(folder, about)
            view: StoreView = FolderView([folder / str(part) for part in range(self.parts)])
        else:
            from kv_transfer.stores.bucket import Bucket, BucketView

            view = BucketView(Bucket(tier), fingerprint, self.parts, about)
        watch = StoreWatch(
            view,
            fingerprint=fingerprint,
            interval_s=_WATCH_S["shared" if tier.shared else tier.kind],
            place=tier.place,
        )
        return StoreTier(
            StoreBlocks(tier.kind, tier.capacity_bytes, tokens, scope_share=tier.scope_share),
            host,
            LoadJudge(steps),
            watch,
            ranks=self.parts,
            block_bytes=self._part_bytes,
            clock=time.monotonic,
            now_ms=lambda: time.time_ns() // 1_000_000,
        )

    def _store(self, tier: Tier, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> SegmentStore:
        memory = _HostRows(self, kv_caches, region, self._fingerprint())
        if tier.kind == "file":
            with _naming(tier):
                folder = Path(tier.place, self._fingerprint(), str(self.part))
                return SegmentFolder(folder, tier.capacity_bytes // self.parts, memory)
        from kv_transfer.stores.bucket import Bucket, SegmentBucket

        return SegmentBucket(Bucket(tier), tier.capacity_bytes // self.parts, memory)

    @property
    def _part_bytes(self) -> int:
        """Of a block, what one rank has. A whole row, which is whole pages, where there is one part."""
        return self.kv_bytes_per_chunk if self.parts == 1 else self.cpu_page_size_per_worker

    def _about(self) -> About:
        return About(
            model=str(self.config.model.name),
            vllm=vllm_version,
            block_tokens=self.tokens_per_block[0],
            block_bytes=self._part_bytes * self.parts,
            parts=self.parts,
        )

    def _fingerprint(self) -> str:
        """Of all that must agree between the engine that wrote a block and the one that reads it."""
        config, parallel = self.config, self.config.parallel
        sizes = (parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size, parallel.world_size)
        digest = layout.fingerprint(
            {
                "model": self.extra_config[MODEL],
                "vllm": vllm_version,
                "dtype": config.model.dtype,
                "layers": repr(config.groups),
                "hash": f"{config.cache.tokens_per_hash} {os.environ.get('PYTHONHASHSEED', '')}",
                "block": f"{self.kv_bytes_per_chunk} {self.replicated_layout} {config.kv_cache_layout}",
                "parallel": repr(sizes),
                "device": current_platform.device_name,
            }
        )
        return digest[:32]


class _HostRows(RankMemory):
    """The slots of the host tier, as one rank has them."""

    def __init__(
        self, spec: HostTierSpec, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, fingerprint: str
    ) -> None:
        self.fingerprint = fingerprint
        self.rank = spec.part
        self.ranks = spec.parts
        self.block_bytes = spec._part_bytes
        self._row_bytes = spec.kv_bytes_per_chunk
        self._memory = region.create_kv_memoryview().cast("B")
        # The tensors of a block lie one after the other, in this order.
        starts = [0, *itertools.accumulate(each.page_size_bytes for each in kv_caches.tensors)]
        self._regions = tuple(
            tuple((starts[ref.tensor_idx], ref.page_size_bytes) for ref in group) for group in kv_caches.group_data_refs
        )

    def row(self, slot: int) -> memoryview:
        """The memory of a slot."""
        start = slot * self._row_bytes + self.rank * self.block_bytes
        return self._memory[start : start + self.block_bytes]

    def index(self, scope: str, entries: Sequence[Entry]) -> Index:
        """The index of a segment with these blocks."""
        return Index(
            fingerprint=self.fingerprint,
            scope=scope,
            rank=self.rank,
            ranks=self.ranks,
            block_bytes=self.block_bytes,
            regions=self._regions,
            entries=tuple(entries),
        )

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.release()


@contextlib.contextmanager
def _naming(tier: Tier) -> Iterator[None]:
    """Say of an OSError which tier it is about."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"kv.tiers: {tier.place} cannot be used: {error.strerror or error}") from error
