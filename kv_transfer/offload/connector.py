"""vLLM's offloading connector with Baton's halves. vLLM's MultiConnector joins it to the NIXL connector.

Three things differ from stock. A load that fails is reported, where stock ends the engine by an assertion. Every block
has checksums (``checked_copier``). And the book of the tier is Baton's (``kv_transfer/tiers``): it is told who found
what corrupt, and knows what not to look up.

vLLM knows the class by its name once this module is imported, as it is in every process that is given the
configuration: no installed plug-in is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from kv_transfer.offload import private
from kv_transfer.offload.messages import TierStats
from kv_transfer.offload.scheduler import TierScheduler
from kv_transfer.offload.worker import TierWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig


class TierConnector(OffloadingConnector):
    """Builds one of the two halves."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        spec = private.init_without_halves(self, vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = TierScheduler(spec, vllm_config, kv_cache_config)
        else:
            self.connector_worker = TierWorker(spec, vllm_config, kv_cache_config)

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Of the scheduler half: what tells which blocks the engine holds."""
        assert isinstance(self.connector_scheduler, TierScheduler)
        self.connector_scheduler.engine_blocks = gpu_block_pool

    def step_ended(self, step: Sequence[int]) -> None:
        """Of the scheduler half: microseconds of a step, its prompt tokens, their pairs, and its decoding sequences."""
        assert isinstance(self.connector_scheduler, TierScheduler)
        step_us, prompt_tokens, _, decoding, *_ = step
        self.connector_scheduler.manager.steps.note(prompt_tokens + decoding, step_us / 1e6)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Of the worker half: loads that are over."""
        assert isinstance(self.connector_worker, TierWorker)
        return self.connector_worker.transfer_results()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Stats from data that crossed a process boundary."""
        return TierStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Nothing for vLLM's Prometheus: a worker's own metrics have it."""
        return _NoPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class _NoPromMetrics(KVConnectorPromMetrics):
    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        pass


# A MultiConnector asks for the class behind the stats of each of its parts, by name.
KVConnectorFactory.register_connector(TierConnector.__name__, __name__, TierConnector.__name__)
