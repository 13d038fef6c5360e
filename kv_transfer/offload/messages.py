"""Messages between the halves of the offloading connector, and what it reports. Holds values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferStats,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from kv_transfer.stores.messages import Ended, StoreOrders
from kv_transfer.tiers.status import BLOCKS_REPORTED_AS


class Slots(CPULoadStoreSpec):
    """Slots of host memory to read, and the checksums that each rank computed of its part before it wrote them."""

    def __init__(self, slots: Sequence[int], sums: Sequence[dict[int, bytes]]) -> None:
        super().__init__(list(slots))
        self.sums = sums


class TierMetadata(OffloadingConnectorMetadata):
    """Stock's, with what to do with the stores, by their place in the order of tiers."""

    def __init__(self, stock: OffloadingConnectorMetadata, stores: Mapping[int, StoreOrders]) -> None:
        super().__init__(stock.load_jobs, stock.store_jobs, stock.jobs_to_flush)
        self.stores = stores


class TierWorkerMetadata(OffloadingWorkerMetadata):
    """Stock's, with what the tiers' scheduler half is told."""

    def __init__(
        self,
        completed_jobs: dict[int, int],
        transfer_stats: TransferStats,
        *,
        sums: dict[int, dict[int, bytes]],
        corrupt: set[int],
        ended: list[tuple[int, Ended]],
    ) -> None:
        super().__init__(completed_jobs, transfer_stats)
        # Of what was written, by rank and slot.
        self.sums = sums
        # Slots that were not what was written.
        self.corrupt = corrupt
        # What became of orders, with the place of the store.
        self.ended = ended

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """What both ranks report."""
        assert isinstance(other, TierWorkerMetadata)
        both = super().aggregate(other)
        return TierWorkerMetadata(
            both.completed_jobs,
            both.transfer_stats,
            sums={rank: self.sums.get(rank, {}) | other.sums.get(rank, {}) for rank in self.sums | other.sums},
            corrupt=self.corrupt | other.corrupt,
            ended=[*self.ended, *other.ended],
        )


class TierStats(KVConnectorStats):
    """The status of every tier, as builtins: it crosses a process boundary."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data if data is not None else {})

    def reset(self) -> None:
        """Nothing is reported."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """The later one says all that the earlier one said, but for blocks that came and went."""
        if not other.data:
            return self
        blocks = [*self.data.get(BLOCKS_REPORTED_AS, ()), *other.data.get(BLOCKS_REPORTED_AS, ())]
        return TierStats({**self.data, **other.data, BLOCKS_REPORTED_AS: blocks})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's own log: nothing, since Baton's metrics have it."""
        return {}

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.data
