"""What vLLM's offloading connector is given: the books of the tiers, what copies, and the stores. Decides nothing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import structlog
import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.version import __version__ as vllm_version

from kv_transfer.handoff import layout
from kv_transfer.offload import private
from kv_transfer.offload.checked_copier import CheckedCopier
from kv_transfer.offload.device_copier import DeviceCopier
from kv_transfer.offload.host_copier import HostCopier
from kv_transfer.offload.host_tier import HostTier
from kv_transfer.offload.rows import HostRows, Rows
from kv_transfer.stores.folder import FolderView, SegmentFolder, describe, fingerprints_in, in_use, remove_unused
from kv_transfer.stores.gpu_direct import DirectFolder, NixlFiles, Slab, Unusable, canary, refuse_silent_copies
from kv_transfer.stores.sealing import Sealer, sealer_of
from kv_transfer.stores.store import RankMemory, SegmentStore
from kv_transfer.stores.tier import StoreTier
from kv_transfer.stores.watch import StoreView, StoreWatch
from kv_transfer.tiers.config import Tier, size_text
from kv_transfer.tiers.cost import FadingLine, LoadJudge
from kv_transfer.tiers.host_blocks import HostBlocks, slots_in
from kv_transfer.tiers.segment import About, segment_bytes
from kv_transfer.tiers.store_blocks import StoreBlocks

log = structlog.get_logger(__name__)

STORES = "baton_stores"
"""Key of kv_connector_extra_config: the tiers below host memory, from near to far, as builtins."""
MODEL = "baton_model"
"""Key of kv_connector_extra_config: what tells apart models and settings whose KV differs."""
OBJECTION = "baton_objection"
"""Key of kv_connector_extra_config: a file for the sentence that says why the tiers cannot be as asked for."""
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
        with self._telling():
            return self._books()

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """What copies, of a worker half. On GPUs stock copies, on streams of its own."""
        with self._telling():
            return self._copies(kv_caches)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What an operator has to set otherwise, the process that started this one says; it sees only that it died."""
        try:
            yield
        except ValueError as error:
            if path := self.extra_config.get(OBJECTION):
                # The sentence itself is raised whatever becomes of the file.
                with contextlib.suppress(OSError):
                    Path(path).write_text(str(error))
            raise

    def _books(self) -> HostTier:
        if self._tier is None:
            tokens = {group.group_id: group.tokens_per_block for group in self.config.groups}
            with_events = self.kv_events_config.enable_kv_cache_events
            host = HostBlocks(self._slots(), self.kv_bytes_per_chunk)
            self._tier = HostTier(host, tokens, with_events=with_events, steps=FadingLine())
            self._tier.stores = [self._store_tier(tier, host, self._tier.steps) for tier in self._tiers()]
        return self._tier

    def _copies(self, kv_caches: CanonicalKVCaches) -> CheckedCopier:
        if self._copier is None:
            self._slots()
            region = private.region(self, self.part)
            if (files := self._direct()) is not None:
                # The ranks need not agree, so each has waited for the others at the region.
                region.cleanup()
                inner: OffloadingWorker = DeviceCopier(kv_caches, files.slab)
            elif current_platform.is_cuda_alike() or current_platform.is_xpu():
                inner = CPUOffloadingWorker(
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
                memory = HostRows if files is None else Rows
                for tier in self._tiers():
                    sealer = sealer_of(tier)
                    rows = memory(self, kv_caches, region, self.fingerprint(sealer))
                    self.stores = [*self.stores, self._store(tier, rows, sealer, files)]
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
        smallest = self.parts * segment_bytes(1, self.part_bytes)
        if tier.capacity_bytes < smallest:
            size = f"holds no block: one takes {smallest} bytes"
            raise ValueError(f"kv.tiers: a {tier.kind} tier of {tier.capacity_bytes} bytes {size}")
        sealer = sealer_of(tier)
        fingerprint = self.fingerprint(sealer)
        watch = StoreWatch(
            self._view(tier, fingerprint, sealer),
            fingerprint=fingerprint,
            interval_s=_WATCH_S["shared" if tier.shared else tier.kind],
            place=tier.place,
        )
        if tier.required and watch.why_off:
            watch.close()
            raise ValueError(f"kv.tiers: {tier.place} cannot be used: {watch.why_off}")
        return StoreTier(
            StoreBlocks(tier.kind, tier.capacity_bytes, tokens, scope_share=tier.scope_share),
            host,
            LoadJudge(steps),
            watch,
            ranks=self.parts,
            block_bytes=self.part_bytes,
            clock=time.monotonic,
            now_ms=lambda: time.time_ns() // 1_000_000,
            write_bytes_per_s=tier.write_bytes_per_s,
        )

    def _view(self, tier: Tier, fingerprint: str, sealer: Sealer | None) -> StoreView:
        """What lies there, after saying that this engine uses it."""
        about = self._about()
        if tier.kind != "file":
            from kv_transfer.stores.bucket import Bucket, BucketView

            return BucketView(Bucket(tier), fingerprint, self.parts, about, sealer)
        place, folder = Path(tier.place), Path(tier.place, fingerprint)
        with _naming(tier):
            self._in_use = [*self._in_use, in_use(folder)]
            remove_unused(place)
            describe(folder, about)
            if others := sorted(fingerprints_in(place) - {fingerprint}):
                log.warning(
                    "engines of other models or settings use this folder too; kv.tiers gives each its size of it",
                    folder=tier.place,
                    size=size_text(tier.capacity_bytes),
                    others=others,
                )
        return FolderView([folder / str(part) for part in range(self.parts)], sealer)

    def _store(self, tier: Tier, memory: RankMemory, sealer: Sealer | None, files: NixlFiles | None) -> SegmentStore:
        capacity_bytes = tier.capacity_bytes // self.parts
        if tier.kind == "file":
            with _naming(tier):
                folder = Path(tier.place, memory.fingerprint, str(self.part))
                if files is not None:
                    return DirectFolder(folder, capacity_bytes, memory, files)
                return SegmentFolder(folder, capacity_bytes, memory, sealer)
        from kv_transfer.stores.bucket import Bucket, SegmentBucket

        return SegmentBucket(Bucket(tier), capacity_bytes, memory, sealer)

    def _direct(self) -> NixlFiles | None:
        """The host tier's slots in GPU memory, where an operator wants that and a canary says that it works."""
        tier = next((tier for tier in self._tiers() if tier.gpudirect), None)
        if tier is None:
            return None
        files: NixlFiles | None = None
        try:
            if not current_platform.is_cuda():
                raise Unusable("this engine runs on no NVIDIA GPU")
            if self.parts < self.config.parallel.world_size:
                raise Unusable("all ranks of this model hold the same KV, which one of them reads and writes")
            files = NixlFiles(Slab(self._slots(), self.part_bytes, torch.device("cuda", torch.cuda.current_device())))
            refuse_silent_copies()
            canary(files, Path(tier.place))
        except Unusable as error:
            if tier.gpudirect == "required":
                raise ValueError(f"kv.tiers: {tier.place} with gpudirect=required: {error}") from error
            why = str(error)
        else:
            log.info("GPUDirect is used: files and GPU memory exchange KV", folder=tier.place)
            return files
        # Neither the files nor the error may hold the slots: torch would keep that memory for tensors of its own.
        files = None
        if current_platform.is_cuda():
            torch.cuda.empty_cache()
        log.warning("GPUDirect is not used: files go through host memory", folder=tier.place, why=why)
        return None

    @property
    def part_bytes(self) -> int:
        """Of a block, what one rank has. A whole row, which is whole pages, where there is one part."""
        return self.kv_bytes_per_chunk if self.parts == 1 else self.cpu_page_size_per_worker

    def _about(self) -> About:
        return About(
            model=str(self.config.model.name),
            vllm=vllm_version,
            block_tokens=self.tokens_per_block[0],
            block_bytes=self.part_bytes * self.parts,
            parts=self.parts,
        )

    def fingerprint(self, sealer: Sealer | None = None) -> str:
        """Of all that must agree between the engine that wrote a block and the one that reads it."""
        config, parallel = self.config, self.config.parallel
        sizes = (parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size, parallel.world_size)
        sealed = {} if sealer is None else {"key": sealer.name}
        digest = layout.fingerprint(
            {
                **sealed,
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


@contextlib.contextmanager
def _naming(tier: Tier) -> Iterator[None]:
    """Say of an OSError which tier it is about."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"kv.tiers: {tier.place} cannot be used: {error.strerror or error}") from error
