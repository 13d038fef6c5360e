"""The scheduler half of Baton's NIXL connector: takes over, holds, releases and attests. Moves nothing.

``kv_transfer.nixl.connector`` says how it differs from the stock half.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

from kv_transfer.handoff.keys import FACTS, LEASE, LEASE_S, RELEASE, RENEW
from kv_transfer.integrity import block_checksums, held_kv_registry
from kv_transfer.nixl import private
from kv_transfer.nixl.messages import (
    CHECK_FRACTION,
    SIDE_CHANNEL_BIND_ADDRESS,
    SIDE_CHANNEL_HOST,
    SIDE_CHANNEL_PORT,
    BatonNixlMetadata,
    BatonWorkerMetadata,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class BatonNixlScheduler(NixlPullConnectorScheduler):
    """Counts tokens to take over, knows the request behind a lease, and replies about the KV that is held."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        config = vllm_config.kv_transfer_config
        assert config is not None
        # By value, not by vLLM's environment variables: two engines may start in one process.
        host: str = config.get_from_extra_config(SIDE_CHANNEL_HOST, "")
        self.side_channel_host = host or envs.VLLM_NIXL_SIDE_CHANNEL_HOST
        self._bind_address: str = config.get_from_extra_config(SIDE_CHANNEL_BIND_ADDRESS, "")
        port = config.get_from_extra_config(SIDE_CHANNEL_PORT, None)
        if port is not None:
            self.side_channel_port = port + vllm_config.parallel_config.data_parallel_index
        self._request_by_lease: dict[str, str] = {}
        self._lease_by_request: dict[str, str] = {}
        self._newly_held: dict[str, int] = {}
        self._to_release: set[str] = set()
        self._to_renew: dict[str, float] = {}
        self._check_fraction = float(config.get_from_extra_config(CHECK_FRACTION, 1.0))
        self._to_check: dict[str, list[int]] = {}
        self._lost: set[str] = set()
        self._registry = held_kv_registry.HeldKvRegistry(engine_id, block_checksums.KIND)
        self._layout: dict[str, str] = {}

    def set_xfer_handshake_metadata(self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]) -> None:
        """Answer handshakes from now on, and keep what they tell of the layout: it is compared before any plan."""
        self._layout = private.layout_facts(metadata)
        super().set_xfer_handshake_metadata(metadata)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens to pull beyond ``num_computed_tokens``, and whether the pull is asynchronous."""
        params = request.kv_transfer_params
        if params is not None and params.get("do_remote_prefill") and params.get("remote_num_tokens"):
            covered = min(int(params["remote_num_tokens"]), request.num_prompt_tokens)
            if covered > request.num_prompt_tokens - private.prefill_backoff(self):
                # The held state includes prompt tokens that this engine computes itself: they would count twice.
                return 0, False
            count = covered - num_computed_tokens
            return (count, True) if count > 0 else (0, False)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Start a lease, or take a message that releases or renews leases."""
        params = request.kv_transfer_params
        if params is not None and FACTS in params:
            return False, {FACTS: {"prefill_backoff_tokens": private.prefill_backoff(self), "layout": self._layout}}
        if params is not None and RELEASE in params:
            self._release(params[RELEASE])
            return False, None
        if params is not None and RENEW in params:
            self._renew(params[RENEW])
            return False, None
        delay_free, answer = super().request_finished(request, block_ids)
        if delay_free and params is not None and LEASE in params:
            assert answer is not None
            request_id = request.request_id
            self._request_by_lease[params[LEASE]] = request_id
            self._lease_by_request[request_id] = params[LEASE]
            self._newly_held[request_id] = sum(len(group) for group in answer["remote_block_ids"])
            self._registry.hold(request_id)
            if len(answer["remote_block_ids"]) == 1 and self._is_checked(params[LEASE]):
                self._to_check[request_id] = list(answer["remote_block_ids"][0])
            if LEASE_S in params:
                private.set_lease_end(self, request_id, time.perf_counter() + float(params[LEASE_S]))
        return delay_free, answer

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Stock metadata with what was held and released since the last step."""
        stock = super().build_connector_meta(scheduler_output)
        assert isinstance(stock, NixlConnectorMetadata)
        meta = BatonNixlMetadata()
        private.copy_metadata(stock, meta)
        meta.baton_held, self._newly_held = self._newly_held, {}
        meta.baton_release, self._to_release = self._to_release, set()
        meta.baton_renew, self._to_renew = self._to_renew, {}
        meta.baton_check, self._to_check = self._to_check, {}
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the worker halves' reports. Forget the leases whose blocks are about to be freed."""
        super().update_connector_output(connector_output)
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, BatonWorkerMetadata):
            self._lost |= told.lost
            for request_id, ranks in told.checksums.items():
                for rank, checksums in ranks.items():
                    self._registry.learn(request_id, rank, checksums)
        for request_id in connector_output.finished_sending or ():
            lease = self._lease_by_request.pop(request_id, None)
            if lease is not None:
                self._request_by_lease.pop(lease, None)
            self._to_release.discard(request_id)
            self._to_renew.pop(request_id, None)
            self._to_check.pop(request_id, None)
            # After this call the blocks are free. No reply may say any more that they are held.
            self._registry.end(request_id, pulled=request_id not in self._lost)
            self._lost.discard(request_id)

    def _is_checked(self, lease: str) -> bool:
        return held_kv_registry.is_checked(lease, self._check_fraction)

    def _nixl_handshake_listener(
        self,
        encoded_data: dict[tuple[int, int], Any],
        ready_event: threading.Event,
        stop_event: threading.Event,
        host: str,
        port: int,
    ) -> None:
        """The stock thread replies with what it finds in ``encoded_data``. There it also finds our replies.

        Stock binds the ``host`` that it advertises. The one that we advertise may be no address of this machine.
        """
        replies = held_kv_registry.HandshakeResponder(encoded_data, self._registry)
        private.serve_handshakes(replies, ready_event, stop_event, self._bind_address or host, port)

    def _release(self, leases: list[str]) -> None:
        """Unknown leases were pulled, ran out or never began. They need nothing."""
        self._to_release.update(self._request_by_lease[lease] for lease in leases if lease in self._request_by_lease)

    def _renew(self, leases: dict[str, float]) -> None:
        """Unknown leases have ended. They do not come back."""
        for lease, lease_s in leases.items():
            if (request_id := self._request_by_lease.get(lease)) is not None:
                self._to_renew[request_id] = float(lease_s)
