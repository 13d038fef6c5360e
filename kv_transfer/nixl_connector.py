"""vLLM's NIXL pull connector with exact take-over and release by message. Never decides who pulls from whom.

Six things differ from the stock connector, all through methods it offers for overriding:

1. Decode takes over ``min(remote_num_tokens, prompt)`` tokens. Stock takes *all* prompt tokens as remote, which kills
   the engine when the prompt is one token longer than what was prefilled and that token begins a new block.
2. Kept KV is freed when a message says so, not only when it was pulled or its lease ran out. The message is a request
   that vLLM aborts at once (``AsyncLLM.notify_kv_transfer_request_rejected``) with ``kv_transfer_params`` =
   ``{"baton_release": [lease ids]}``. The scheduler half passes it with the next step's metadata to each worker half,
   which stops tracking the request and reports it as sent, exactly once; vLLM's own aggregation over ranks frees it.
3. A lease is renewed the same way, with ``{"baton_renew": {lease id: seconds from now}}``, on every worker half.
   vLLM's own heartbeats from decode engines renew too, without a bound; a release ends them all the same.
4. No pull is used before it is proved (``pull_proof``): the worker half reports a request as received only then, and
   one that cannot be proved as failed to load. Holding, the worker half computes checksums of the blocks and tells the
   scheduler half, which answers for them on the side channel.
5. The thread that builds the worker half keeps its cores. Stock binds it, on CPU, to the last core of every NUMA node:
   with the model in the same thread, all engines of a machine then compute on that one core.
6. A peer whose process is gone is found out by one connect before the handshake, which would take 5 s, one peer
   after the other. The load then counts as failed, and ``kv_load_failure_policy`` "recompute" computes the prompt here.

Params Baton adds to vLLM's: ``baton_lease`` (lease id) and ``baton_lease_s`` (seconds to keep the KV) on a prefill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector

from kv_transfer.nixl_messages import BatonNixlStats
from kv_transfer.nixl_scheduler import BatonNixlScheduler
from kv_transfer.nixl_worker import BatonNixlWorker
from runtime.orphan import stop_with_parent

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class NixlConnector(NixlPullConnector):
    """The connector that ``kv_transfer_config`` names; builds one of the two halves.

    It has the stock connector's name because vLLM 0.32 decides by that name: which checks and cache layouts apply
    (``KVTransferConfig.has_connector``) and, inside a MultiConnector, which class reads its stats.
    """

    scheduler_half = BatonNixlScheduler
    worker_half = BatonNixlWorker

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        # Past NixlPullConnector's own __init__, which would build the stock halves and their NIXL agent.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = self.scheduler_half(vllm_config, self.engine_id, kv_cache_config)
            # The only code of ours in vLLM's engine process, which does not notice that its parent was killed.
            stop_with_parent()
        else:
            assert role is KVConnectorRole.WORKER
            self.connector_worker = self.worker_half(vllm_config, self.engine_id, kv_cache_config)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What this step's scheduler half is told."""
        return self.connector_worker.take_metadata() if isinstance(self.connector_worker, BatonNixlWorker) else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Stats from what crossed a process boundary."""
        return BatonNixlStats(data=data) if data is not None else BatonNixlStats()
