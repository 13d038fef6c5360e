"""The worker half: copies as stock does, and reports a load that failed instead of ending the engine."""

from __future__ import annotations

import structlog
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker

from kv_transfer.offload import private
from kv_transfer.offload.checked_copier import CheckedCopier
from kv_transfer.offload.messages import TierMetadata, TierWorkerMetadata
from kv_transfer.offload.spec import HostTierSpec

log = structlog.get_logger(__name__)


class TierWorker(OffloadingConnectorWorker):
    """One rank's."""

    worker: CheckedCopier | None
    spec: HostTierSpec

    def start_kv_transfers(self, metadata: OffloadingConnectorMetadata) -> None:
        """What a step has to copy, and what to do with stores."""
        super().start_kv_transfers(metadata)
        if isinstance(metadata, TierMetadata) and self.spec.stores:
            for place, orders in metadata.stores.items():
                self.spec.stores[place].submit(orders)

    def shutdown(self) -> None:
        """End what is under way, then let go of the memory."""
        self.spec.close_stores()
        super().shutdown()

    def transfer_results(self) -> KVConnectorTransferResults:
        """Requests whose loads are over, and those of them whose loads cannot be used: vLLM computes their prompts."""
        assert self.worker is not None
        results = KVConnectorTransferResults()
        for result in self.worker.get_finished():
            request_id = private.note_finished(self, result)
            if request_id is None:
                continue
            results.finished_recving.add(request_id)
            if not result.success:
                log.warning("KV in host memory is not what was stored; its prompt is computed", request_id=request_id)
                results.failed_recving.add(request_id)
        return results

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        """Jobs that are over, and what their checks say."""
        meta, part = super().build_connector_worker_meta(), self.spec.part
        ended = [(place, each) for place, store in enumerate(self.spec.stores) for each in store.finished()]
        if self.worker is None or (meta is None and not ended):
            return None
        meta = meta or OffloadingWorkerMetadata()
        return TierWorkerMetadata(
            meta.completed_jobs,
            meta.transfer_stats,
            sums={part: self.worker.take_stored()},
            corrupt=self.worker.take_corrupt(),
            ended=ended,
        )
