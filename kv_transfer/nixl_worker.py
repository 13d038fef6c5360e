"""The worker half of Baton's NIXL connector: pulls, serves pulls, proves and lets go. Decides nothing of its own.

``nixl_connector`` says how it differs from the stock one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import structlog
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.nixl_utils import NixlWrapper

from kv_transfer import block_sums
from kv_transfer.nixl_messages import (
    BLOCKS_OUT,
    CONNECT_TIMEOUT_S,
    LEASES_RELEASED,
    PROGRESS_DELAY_US,
    PROOF_TIMEOUT_S,
    PULLED_AFTER_RELEASE,
    PULLS,
    BatonNixlMetadata,
    BatonNixlStats,
    BatonWorkerMetadata,
    question,
)
from kv_transfer.pull_proof import USABLE
from kv_transfer.pull_prover import Holder, PullProver, SideChannelLines

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = structlog.get_logger(__name__)

# Where the engine's settings do not say; Baton's always do.
_TIMEOUT_S = 2.0
_RELEASED_REMEMBERED_MAX = 4096


@contextlib.contextmanager
def progress_delay(delay_us: int) -> Iterator[None]:
    """Let the NIXL agent made inside wait ``delay_us`` between two looks at the network instead of spinning.

    NIXL's Python wrapper writes 0 into its agent's settings; then a thread of every idle engine takes a whole core
    (measured: 1.00 core with 0, 0.005 core with 1 us). The wrapper offers no setting, so its settings class is
    exchanged for the time of the construction.
    """
    wrapper = sys.modules.get(getattr(NixlWrapper, "__module__", ""))
    bindings = getattr(wrapper, "nixlBind", None)
    stock = getattr(bindings, "nixlAgentConfig", None)
    if delay_us <= 0 or bindings is None or stock is None:
        yield
        return

    class Patient(stock):  # type: ignore[misc, valid-type]  # a class that is known only when NIXL is there
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, delay_us if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = Patient
    try:
        yield
    finally:
        bindings.nixlAgentConfig = stock


@contextlib.contextmanager
def cores_kept() -> Iterator[None]:
    """Whatever happens inside, the calling thread may run where it might before."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class BatonNixlWorker(NixlPullConnectorWorker):
    """Worker half: pulls, serves pulls, and lets go of released requests."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        config = vllm_config.kv_transfer_config
        assert config is not None
        with progress_delay(config.get_from_extra_config(PROGRESS_DELAY_US, 0)), cores_kept():
            super().__init__(vllm_config, engine_id, kv_cache_config)
        self.xfer_stats = BatonNixlStats()
        self._held_blocks: dict[str, int] = {}
        self._released: set[str] = set()
        # Released while a reader may be under way: its notification will still come and means nothing any more.
        self._let_go: dict[str, None] = {}
        # Of this step: every reader was done; and let go before that.
        self._pulled: set[str] = set()
        self._lost: set[str] = set()
        self._regions: list[torch.Tensor] = []
        # Of what is held, in the order in which the device computes them.
        self._sums: deque[tuple[str, block_sums.PendingSums]] = deque()
        self._proof_timeout_s = float(config.get_from_extra_config(PROOF_TIMEOUT_S, _TIMEOUT_S))
        self._connect_timeout_s = float(config.get_from_extra_config(CONNECT_TIMEOUT_S, _TIMEOUT_S))
        self._prover = PullProver(lines=SideChannelLines(question), timeout_s=self._proof_timeout_s)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register with NIXL, and find the memory whose checksums are computed."""
        super().register_kv_caches(kv_caches)
        self._regions = self._find_regions(kv_caches)
        if self._regions:
            self._prover.close()
            self._prover = PullProver(
                lines=SideChannelLines(question),
                timeout_s=self._proof_timeout_s,
                sums_of=self._sums_of,
                sums_kind=block_sums.KIND,
            )

    def _find_regions(self, kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What NIXL reads blocks from. Empty where that is not one plain list of blocks: then holders vouch instead."""
        plain = (
            len(self.kv_cache_config.kv_cache_groups) == 1
            and self._physical_blocks_per_logical_kv_block == 1
            and not (self.use_host_buffer or self._has_mamba or self._mixed_mem_types or self.enable_permute_local_kv)
        )
        views = [
            block_sums.region_view(kv_caches.values(), base=base, block_bytes=size, stride_bytes=stride, blocks=blocks)
            for base, size, stride, blocks in zip(
                self.kv_caches_base_addr[self.engine_id][self.tp_rank],
                self.block_len_per_layer,
                self.block_stride_per_layer,
                self.region_num_blocks,
                strict=True,
            )
        ]
        found = [view for view in views if view is not None]
        return found if plain and len(found) == len(views) else []

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        """Start the step's pulls and their proofs; note what is held, drop what is released."""
        for request_id, wanted in metadata.reqs_to_recv.items():
            if wanted.awaiting_kvs:
                assert wanted.remote is not None
                holder = Holder(
                    host=wanted.remote.host,
                    port=wanted.remote.port,
                    engine_id=wanted.remote.engine_id,
                    request_id=wanted.remote.request_id,
                    rank=self.tp_rank,
                )
                self._prover.begin(request_id, holder, [block for group in wanted.local_block_ids for block in group])
        super().start_load_kv(metadata)
        if not isinstance(metadata, BatonNixlMetadata):
            return
        # One whose reader was faster than this step is over already.
        held = {request_id: blocks for request_id, blocks in metadata.baton_held.items() if self._tracks(request_id)}
        self._held_blocks.update(held)
        for request_id in held.keys() & metadata.baton_check.keys():
            self._note_sums(request_id, metadata.baton_check[request_id])
        now_s = time.perf_counter()
        for request_id, lease_s in metadata.baton_renew.items():
            if request_id in self._reqs_to_send:
                self._reqs_to_send[request_id] = max(self._reqs_to_send[request_id], now_s + lease_s)
        for request_id in metadata.baton_release:
            if request_id not in self._reqs_to_process:
                continue  # this rank has reported it already: it was pulled from here, or its lease ran out
            self._reqs_to_process.remove(request_id)
            self._reqs_to_send.pop(request_id, None)
            self._released.add(request_id)
            self._let_go[request_id] = None
        while len(self._let_go) > _RELEASED_REMEMBERED_MAX:
            self._forget(next(iter(self._let_go)))

    def get_transfer_results(self) -> KVConnectorTransferResults:
        """Stock results with the requests that were released in this step, and pulls only once they are proved."""
        results = super().get_transfer_results()
        self._hold_back_unproved(results)
        if self._released:
            assert not self._released & results.finished_sending, "a released request was reported twice"
            results.finished_sending.update(self._released)
            self.xfer_stats.data[LEASES_RELEASED].append(len(self._released))
            self._released.clear()
        self._lost.update(results.finished_sending - self._pulled)
        self._pulled.clear()
        for request_id in results.finished_sending:
            self._held_blocks.pop(request_id, None)
        return results

    def take_metadata(self) -> BatonWorkerMetadata | None:
        """What the scheduler half has not been told yet."""
        sums: dict[str, dict[int, bytes]] = {}
        while self._sums and (ready := self._sums[0][1].ready()) is not None:
            request_id, _ = self._sums.popleft()
            sums[request_id] = {self.tp_rank: ready}
        lost, self._lost = self._lost, set()
        return BatonWorkerMetadata(sums, lost) if sums or lost else None

    def shutdown(self) -> None:
        """End the proofs' threads too, and let go of the KV cache."""
        super().shutdown()
        self._prover.close()
        self._regions = []

    def _get_new_notifs(self) -> set[str]:
        """Requests whose every reader is done: their blocks have left this engine.

        Stock takes a notification for a request it does not track as a sign of corruption. One that crossed our
        release is none: the reader was aborted. So those are tracked for the length of this call.
        """
        self._reqs_to_process.update(self._let_go)
        pulled = super()._get_new_notifs()
        self._reqs_to_process.difference_update(self._let_go)
        for request_id in pulled & self._let_go.keys():
            self._forget(request_id)
            pulled.discard(request_id)
            self.xfer_stats.data[PULLED_AFTER_RELEASE].append(1)
        self._pulled.update(pulled)
        for request_id in pulled:
            self.xfer_stats.data[BLOCKS_OUT].append(self._held_blocks.pop(request_id, 0))
        return pulled

    def _tracks(self, request_id: str) -> bool:
        return request_id in self._reqs_to_process

    def _forget(self, request_id: str) -> None:
        del self._let_go[request_id]
        self.consumer_notification_counts_by_req.pop(request_id, None)
        self.expected_consumer_notifications_by_req.pop(request_id, None)

    def _nixl_handshake(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        """Fail at once where nobody listens, instead of after the handshake's own 5 s."""
        socket.create_connection((host, port), timeout=self._connect_timeout_s).close()
        return super()._nixl_handshake(host, port, *args, **kwargs)

    def _hold_back_unproved(self, results: KVConnectorTransferResults) -> None:
        """Let the scheduler see only pulls that may be used, or that failed."""
        for request_id in results.finished_recving & results.failed_recving:
            self._prover.drop(request_id)
        for request_id in results.finished_recving - results.failed_recving:
            self._prover.read_done(request_id)
            results.finished_recving.discard(request_id)
        for request_id, (verdict, block_ids) in self._prover.verdicts().items():
            self.xfer_stats.data[PULLS[verdict]].append(1)
            results.finished_recving.add(request_id)
            if verdict not in USABLE:
                log.warning(
                    "pulled KV is not used, its prompt is computed again", request_id=request_id, verdict=str(verdict)
                )
                results.failed_recving.add(request_id)
                if not self._is_hma_required:
                    self._invalid_block_ids.put(set(block_ids))

    def _note_sums(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Compute the checksums of what is held from now on: behind the step that wrote it, before any other writes."""
        if not self._regions or not block_ids:
            return
        self._sums.append((request_id, block_sums.PendingSums(block_sums.block_sums(self._regions, block_ids))))

    def _sums_of(self, block_ids: Sequence[int]) -> block_sums.PendingSums:
        """Checksums of blocks that were read: on CUDA on a stream that waits for no step of the model."""
        if self._regions[0].device.type != "cuda":
            return block_sums.PendingSums(block_sums.block_sums(self._regions, block_ids))
        with torch.cuda.stream(torch.cuda.Stream(self._regions[0].device)):
            return block_sums.PendingSums(block_sums.block_sums(self._regions, block_ids))
