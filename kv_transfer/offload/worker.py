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
from kv_transfer.offload.block_folder import FileJob
from kv_transfer.offload.checked_copier import CheckedCopier
from kv_transfer.offload.messages import TierMetadata, TierWorkerMetadata
from kv_transfer.offload.spec import HostTierSpec

log = structlog.get_logger(__name__)


class TierWorker(OffloadingConnectorWorker):
    """One rank's."""

    worker: CheckedCopier | None
    spec: HostTierSpec

    def start_kv_transfers(self, metadata: OffloadingConnectorMetadata) -> None:
        """What a step has to copy, and what to do with files."""
        super().start_kv_transfers(metadata)
        if (folder := self.spec.folder) is not None and isinstance(metadata, TierMetadata):
            part, orders = self.spec.part, metadata.files
            folder.write(
                [FileJob(each.key, each.slot, each.sums.get(part, b"")) for each in orders.writes], orders.gone
            )
            folder.read([FileJob(order.key, order.slot) for order in orders.reads])

    def shutdown(self) -> None:
        """End what is under way, then let go of the memory."""
        self.spec.close_folder()
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
        files = [(part, result) for result in self.spec.folder.finished()] if self.spec.folder is not None else []
        if self.worker is None or (meta is None and not files):
            return None
        meta = meta or OffloadingWorkerMetadata()
        return TierWorkerMetadata(
            meta.completed_jobs,
            meta.transfer_stats,
            sums={part: self.worker.take_stored()},
            corrupt=self.worker.take_corrupt(),
            files=files,
        )
