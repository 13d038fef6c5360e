"""The slots of the host tier as a rank's stores see them: where a slot lies, and what segments have in common."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from kv_transfer.stores.store import RankMemory
from kv_transfer.tiers.segment import Entry, Index

if TYPE_CHECKING:
    from kv_transfer.offload.spec import HostTierSpec


class Rows(RankMemory):
    """The slots of the host tier, as one rank has them: what does not depend on where they are."""

    def __init__(
        self, spec: HostTierSpec, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, fingerprint: str
    ) -> None:
        self.fingerprint = fingerprint
        self.rank = spec.part
        self.ranks = spec.parts
        self.block_bytes = spec.part_bytes
        # The tensors of a block lie one after the other, in this order.
        starts = [0, *itertools.accumulate(each.page_size_bytes for each in kv_caches.tensors)]
        self._regions = tuple(
            tuple((starts[ref.tensor_idx], ref.page_size_bytes) for ref in group) for group in kv_caches.group_data_refs
        )

    def row(self, slot: int) -> memoryview:
        """Of GPU memory there is no view."""
        raise NotImplementedError

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
        """Nothing: what copies has the memory."""


class HostRows(Rows):
    """In host memory."""

    def __init__(
        self, spec: HostTierSpec, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, fingerprint: str
    ) -> None:
        super().__init__(spec, kv_caches, region, fingerprint)
        self._row_bytes = spec.kv_bytes_per_chunk
        self._memory = region.create_kv_memoryview().cast("B")

    def row(self, slot: int) -> memoryview:
        """The memory of a slot."""
        start = slot * self._row_bytes + self.rank * self.block_bytes
        return self._memory[start : start + self.block_bytes]

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.release()
