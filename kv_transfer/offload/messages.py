"""Messages between the halves of the offloading connector, and what it reports. Holds values only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferStats,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from kv_transfer.offload.block_folder import FileResult


class Slots(CPULoadStoreSpec):
    """Slots of host memory to read, and the checksums that each rank computed of its part before it wrote them."""

    def __init__(self, slots: Sequence[int], sums: Sequence[dict[int, bytes]]) -> None:
        super().__init__(list(slots))
        self.sums = sums


class FileOrder(msgspec.Struct, frozen=True):
    """A block to read into a slot, or to write from it with the checksums of each rank's part."""

    key: bytes
    slot: int
    sums: dict[int, bytes]


class FileOrders(msgspec.Struct):
    """What the worker halves are to do with files in a step. ``gone``: blocks whose files are to be removed first."""

    reads: list[FileOrder] = msgspec.field(default_factory=list)
    writes: list[FileOrder] = msgspec.field(default_factory=list)
    gone: list[bytes] = msgspec.field(default_factory=list)


class TierMetadata(OffloadingConnectorMetadata):
    """Stock's, with what to do with files."""

    def __init__(self, stock: OffloadingConnectorMetadata, files: FileOrders) -> None:
        super().__init__(stock.load_jobs, stock.store_jobs, stock.jobs_to_flush)
        self.files = files


class TierWorkerMetadata(OffloadingWorkerMetadata):
    """Stock's, with what the tiers' scheduler half is told."""

    def __init__(
        self,
        completed_jobs: dict[int, int],
        transfer_stats: TransferStats,
        *,
        sums: dict[int, dict[int, bytes]],
        corrupt: set[int],
        files: list[tuple[int, FileResult]],
    ) -> None:
        super().__init__(completed_jobs, transfer_stats)
        # Of what was written, by rank and slot.
        self.sums = sums
        # Slots that were not what was written.
        self.corrupt = corrupt
        # What became of orders, with the rank that did them.
        self.files = files

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """What both ranks report."""
        assert isinstance(other, TierWorkerMetadata)
        both = super().aggregate(other)
        return TierWorkerMetadata(
            both.completed_jobs,
            both.transfer_stats,
            sums={rank: self.sums.get(rank, {}) | other.sums.get(rank, {}) for rank in self.sums | other.sums},
            corrupt=self.corrupt | other.corrupt,
            files=[*self.files, *other.files],
        )


class TierStats(KVConnectorStats):
    """The status of every tier, as builtins: it crosses a process boundary."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data if data is not None else {})

    def reset(self) -> None:
        """Nothing is reported."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """The later one says all that the earlier one said."""
        return other if other.data else self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's own log: nothing, since Baton's metrics have it."""
        return {}

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.data
