"""vLLM's NIXL pull connector with exact take-over and release by message. Never decides which engine pulls from which.

Six things differ from the stock connector. Overridden methods do all of them (``docs/upstream.md`` lists them):

1. Decode takes over ``min(remote_num_tokens, prompt)`` tokens. Stock takes *all* prompt tokens as remote. That kills
   the engine when the prompt is one token longer than what was prefilled and that token begins a new block.
2. Held KV is also freed by message; stock frees it only after a pull or when its lease runs out. The message is a
   request that vLLM aborts at once (``AsyncLLM.notify_kv_transfer_request_rejected``) with ``kv_transfer_params`` =
   ``{"baton_release": [lease ids]}``. The scheduler half passes it with the next step's metadata to each worker half.
   The worker half stops tracking the request and reports it as sent, once. vLLM frees it after every rank did.
3. A lease is renewed the same way, with ``{"baton_renew": {lease id: seconds from now}}``, on every worker half.
   vLLM's own heartbeats from decode engines renew it too, without a bound. A release also ends such a lease.
4. No pull is used before it is proved (``integrity.transfer_proof``). The worker half reports a request as received
   only after its proof. A pull that cannot be proved counts as failed to load. On the holder's side the worker half
   computes checksums of held blocks, and the scheduler half replies with them on the side channel.
5. The thread that builds the worker half keeps its cores. On CPU, stock binds it to the last core of every NUMA node.
   The model runs in the same thread, so all engines of a machine would compute on that one core.
6. One connect before the handshake detects a dead peer. The handshake would take 5 s for each peer,
   in turn. The load counts as failed, and ``kv_load_failure_policy`` "recompute" computes the prompt here.

Params that Baton adds to vLLM's on a prefill: ``baton_lease`` (lease id), ``baton_lease_s`` (seconds to hold the KV).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector

from kv_transfer.nixl import private
from kv_transfer.nixl.messages import BatonNixlStats
from kv_transfer.nixl.scheduler import BatonNixlScheduler
from kv_transfer.nixl.worker import BatonNixlWorker
from runtime.process.orphan import stop_with_parent

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class NixlConnector(NixlPullConnector):
    """The connector that ``kv_transfer_config`` names. Builds one of the two halves.

    vLLM 0.32 decides by the name ``NixlConnector`` which checks and cache layouts apply
    (``KVTransferConfig.has_connector``) and, inside a MultiConnector, which class reads its stats.
    """

    scheduler_half = BatonNixlScheduler
    worker_half = BatonNixlWorker

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        private.init_without_halves(self, vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = self.scheduler_half(vllm_config, self.engine_id, kv_cache_config)
            # vLLM's engine process does not notice that its parent was killed. This is our only code in that process.
            stop_with_parent()
        else:
            assert role is KVConnectorRole.WORKER
            self.connector_worker = self.worker_half(vllm_config, self.engine_id, kv_cache_config)
            if vllm_config.parallel_config.nnodes > 1:
                # Nor does a rank that waits for the next step of a leader on another node.
                stop_with_parent()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the worker half tells the scheduler half after this step."""
        return self.connector_worker.take_metadata() if isinstance(self.connector_worker, BatonNixlWorker) else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Stats from data that crossed a process boundary."""
        return BatonNixlStats(data=data) if data is not None else BatonNixlStats()
