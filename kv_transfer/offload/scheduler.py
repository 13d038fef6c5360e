"""The scheduler half: asks the book, judges whether a load pays, and takes in what the worker halves found out."""

from __future__ import annotations

import functools
import itertools
import time
from typing import TYPE_CHECKING

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.kv_offload.base import get_offload_block_hash

from kv_transfer.offload import private
from kv_transfer.offload.block_entries import entries_of, events_of
from kv_transfer.offload.host_tier import HostTier, takes_over
from kv_transfer.offload.messages import TierMetadata, TierStats, TierWorkerMetadata
from kv_transfer.prefix.events import to_builtins
from kv_transfer.tiers.cost import LoadJudge
from kv_transfer.tiers.segment import scope_of
from kv_transfer.tiers.status import BLOCKS_REPORTED_AS, REPORTED_AS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadingSpec, OffloadKey
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class TierScheduler(OffloadingConnectorScheduler):
    """Stock's, with one answer more for a request: that its blocks are here and computing them is faster."""

    manager: HostTier

    def __init__(self, spec: OffloadingSpec, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(spec, vllm_config, kv_cache_config)
        self._block_tokens = min(spec.tokens_per_block)
        self._one_group = len(spec.tokens_per_block) == 1
        self._judge = LoadJudge(self.manager.steps)
        # Requests whose lookup was counted, and the answer that stays for those that are not to load.
        self._asked: dict[str, bool] = {}
        # Of requests that were answered and may wait for the engine's memory still: the tokens that it has of them.
        self._held: dict[str, int] = {}
        # Tokens that a request loads, and since when.
        self._loading: dict[str, tuple[int, float]] = {}
        self._told: object = None
        # Those that came since the last step, and that were not looked at yet.
        self._arrived: dict[str, Request] = {}
        self.engine_blocks: BlockPool | None = None
        # Where blocks are looked up from a prompt's beginning on, and nowhere else.
        self._in_a_row = self._one_group and self.config.kv_group_configs[0].sliding_window_size_in_chunks is None

    def on_new_request(self, request: Request) -> None:
        """It comes in, with what a store's index is to say of its blocks when it ends."""
        super().on_new_request(request)
        context = private.context_of(self, request.request_id)
        described = functools.partial(entries_of, request, context, self._block_tokens if self._one_group else 0)
        self.manager.describe(context, scope_of(request.cache_salt or ""), described)
        self._arrived[request.request_id] = request

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int, max_num_new_tokens: int | None = None
    ) -> tuple[int | None, bool]:
        """Tokens to load beyond ``num_computed_tokens``; None: ask again later. A load is asynchronous."""
        self._arrived.pop(request.request_id, None)
        count, later = super().get_num_new_matched_tokens(request, num_computed_tokens, max_num_new_tokens)
        if count is None or takes_over(request.kv_transfer_params):
            return count, later
        pays = self._asked.get(request.request_id)
        if pays is None:
            pays = self._asked[request.request_id] = not count or self._judge.pays(count)
            found = count // self._block_tokens
            missing = (request.num_prompt_tokens - num_computed_tokens) // self._block_tokens - found
            self.manager.blocks.missed(max(0, missing))
            if not pays:
                self.manager.blocks.declined(found)
        self._held[request.request_id] = num_computed_tokens
        return (count, later) if pays else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The engine has blocks for what is loaded."""
        # Until now what was read ahead for it had to stay: the engine may have lacked room for many steps.
        if (held_tokens := self._held.pop(request.request_id, None)) is not None:
            context = private.context_of(self, request.request_id)
            self.manager.answered(context, held_tokens, num_external_tokens)
        if num_external_tokens:
            self._loading[request.request_id] = (num_external_tokens, time.monotonic())
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the worker halves have to copy in this step."""
        for request_id in scheduler_output.finished_req_ids or ():
            self._asked.pop(request_id, None)
            self._held.pop(request_id, None)
            self._loading.pop(request_id, None)
        meta = super().build_connector_meta(scheduler_output)
        assert isinstance(meta, OffloadingConnectorMetadata)
        self._read_ahead()
        idle, self.manager.idle = self.manager.idle, False
        found = {place: store.take_orders(idle=idle) for place, store in enumerate(self.manager.stores)}
        orders = {place: each for place, each in found.items() if each is not None}
        return TierMetadata(meta, orders) if orders else meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """A step has ended: learn what it wrote, what it found corrupt, and how long loads took."""
        now_s = time.monotonic()
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, TierWorkerMetadata):
            for rank, sums in told.sums.items():
                self.manager.blocks.learn(rank, sums)
            # Before stock lets go of them: what is condemned must not be found again.
            self.manager.condemn(told.corrupt)
            for place, ended in told.ended:
                self.manager.store_ended(place, ended)
        for request_id in connector_output.finished_recving or ():
            if (load := self._loading.pop(request_id, None)) is not None:
                self._judge.loaded(load[0], now_s - load[1])
        for request_id in connector_output.failed_recving or ():
            private.store_again(self, request_id)
        super().update_connector_output(connector_output)

    def _read_ahead(self) -> None:
        """Stock looks at a request when it is its turn, when those in front have run. Its reads need not wait so."""
        arrived, self._arrived = self._arrived, {}
        if not self.manager.stores or not self._in_a_row or self.engine_blocks is None:
            return
        for request in arrived.values():
            if not request.is_finished() and not request.skip_reading_prefix_cache:
                keys = private.name_blocks(self, request.request_id)
                held = sum(1 for _ in itertools.takewhile(self._engine_holds, keys))
                self.manager.read_ahead(keys[held:], private.context_of(self, request.request_id))

    def _engine_holds(self, key: OffloadKey) -> bool:
        assert self.engine_blocks is not None
        return self.engine_blocks.get_cached_block(BlockHash(get_offload_block_hash(key)), [0]) is not None

    def shutdown(self) -> None:
        """Watch no store any more."""
        super().shutdown()
        self.manager.shutdown()

    def get_stats(self) -> TierStats | None:
        """The tiers, where they changed. Stock's own numbers are for vLLM's Prometheus, which is off."""
        super().get_stats()
        host = self.manager.blocks.status(self._judge.line)
        statuses = [host, *(store.status() for store in self.manager.stores)]
        stores = self.manager.stores
        blocks = [event for store in stores for event in events_of(store.blocks.kind, store.take_told())]
        if statuses == self._told and not blocks:
            return None
        self._told = statuses
        return TierStats({REPORTED_AS: msgspec.to_builtins(statuses), BLOCKS_REPORTED_AS: to_builtins(blocks)})
