"""Every touch of vLLM's offloading connector that it does not offer as an interface. One function a touch.

``docs/upstream.md`` says why each is needed and when it can go.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import OffloadingSpec, OffloadKey, ReqContext, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec, _all_workers_barrier
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def init_without_halves(
    connector: OffloadingConnector, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
) -> OffloadingSpec:
    """Initialise the connector without its stock halves; the specification to build ours with."""
    KVConnectorBase_V1.__init__(connector, vllm_config, role, kv_cache_config)
    config = build_offloading_config(vllm_config, kv_cache_config)
    connector._canonical_layout = config.canonical_layout
    connector.connector_scheduler = None
    connector.connector_worker = None
    return OffloadingSpecFactory.create_spec(config)


def keys_of(context: ReqContext) -> Collection[OffloadKey]:
    """Every block of a request."""
    return context._offload_key_positions


def name_blocks(half: OffloadingConnectorScheduler, request_id: str) -> list[OffloadKey]:
    """The blocks of a request in the first group, in order. Stock names them when the request is first looked at."""
    status = half._req_status[request_id]
    status.update_offload_keys()
    return status.group_states[0].offload_keys


def context_of(half: OffloadingConnectorScheduler, request_id: str) -> ReqContext:
    """What stock keeps of a request."""
    return half._req_status[request_id].req_context


def region(spec: CPUOffloadingSpec, part: int) -> SharedOffloadRegion:
    """The host memory of a worker. It has no name once every rank has it, so no way to die leaves it behind."""
    return SharedOffloadRegion(
        engine_id=spec.config.engine_id,
        num_chunks=spec.num_chunks,
        rank=part,
        kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
        cpu_page_size=spec.cpu_page_size_per_worker,
        barrier=_all_workers_barrier,
    )


def store_again(half: OffloadingConnectorScheduler, request_id: str) -> None:
    """A load of this request failed: what it computes instead is to be stored. Stock counts it as stored already."""
    if (status := half._req_status.get(request_id)) is not None:
        for group in status.group_states:
            group.next_stored_chunk_idx = 0


def note_finished(half: OffloadingConnectorWorker, result: TransferResult) -> str | None:
    """Take a finished job as stock does, which asserts that it succeeded; the request that waits for it, of a load."""
    request_id = half._load_jobs.pop(result.job_id, None)
    meta = half._connector_worker_meta
    if result.transfer_size is not None and result.transfer_time is not None:
        stats = meta.transfer_stats.store if request_id is None else meta.transfer_stats.load
        stats.record(result.transfer_size, result.transfer_time)
    meta.mark_completed(result.job_id)
    return request_id
