"""The worker half of Baton's NIXL connector: pulls, serves pulls, proves pulls and releases. Decides nothing itself.

``kv_transfer.nixl.connector`` says how it differs from the stock half.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import structlog
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG, NixlConnectorMetadata

from kv_transfer.integrity.block_checksums import KIND, PendingChecksums, block_checksums, region_view
from kv_transfer.integrity.held_kv_registry import question
from kv_transfer.integrity.transfer_proof import USABLE
from kv_transfer.integrity.transfer_verifier import Holder, SideChannel, TransferVerifier
from kv_transfer.nixl import private
from kv_transfer.nixl.messages import (
    BLOCKS_OUT,
    CONNECT_TIMEOUT_S,
    PROGRESS_DELAY_US,
    PROOF_TIMEOUT_S,
    PULLS,
    TRANSPORT_REQUIRED,
    TRANSPORTS,
    BatonNixlMetadata,
    BatonNixlStats,
    BatonWorkerMetadata,
)
from kv_transfer.nixl.ucx_log import UcxLog

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = structlog.get_logger(__name__)

# Defaults of the connector. Baton always sets its own values.
_TIMEOUT_S = 2.0
_RELEASED_REMEMBERED_MAX = 4096
_ENGINES_REMEMBERED_MAX = 4096
UNKNOWN = "unknown"
"""The transport where UCX's log does not say it."""


@contextlib.contextmanager
def cores_kept() -> Iterator[None]:
    """Restore the calling thread's cores on leaving, whatever happened inside."""
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class BatonNixlWorker(NixlPullConnectorWorker):
    """Pulls, serves pulls, and stops tracking released requests."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        config = vllm_config.kv_transfer_config
        assert config is not None
        self._ucx_log = UcxLog()
        try:
            with private.progress_delay(config.get_from_extra_config(PROGRESS_DELAY_US, 0)), cores_kept():
                super().__init__(vllm_config, engine_id, kv_cache_config)
        except Exception:
            self._pass_on_ucx_log()
            raise
        finally:
            self._ucx_log.opened()
        self._transport_required = str(config.get_from_extra_config(TRANSPORT_REQUIRED, ""))
        self._transports: set[str] = set()
        # Requests that pull from an engine for the first time, each with that engine and its host.
        self._first_pulls: dict[str, tuple[str, str]] = {}
        self._engines_met: set[str] = set()
        self.xfer_stats = BatonNixlStats()
        self._held_blocks: dict[str, int] = {}
        self._released: set[str] = set()
        # Released while a reader may still run. The reader's notification will come and means nothing any more.
        self._dismissed: dict[str, None] = {}
        # In this step: requests whose every reader is done.
        self._pulled: set[str] = set()
        # In this step: requests released before that.
        self._lost: set[str] = set()
        self._regions: list[torch.Tensor] = []
        # Of held blocks, in the order in which the device computes them.
        self._checksums: deque[tuple[str, PendingChecksums]] = deque()
        self._connect_timeout_s = float(config.get_from_extra_config(CONNECT_TIMEOUT_S, _TIMEOUT_S))
        self._verifier = TransferVerifier(
            channel=SideChannel(functools.partial(question, GET_META_MSG)),
            timeout_s=float(config.get_from_extra_config(PROOF_TIMEOUT_S, _TIMEOUT_S)),
            checksums_of=self._checksums_of,
        )

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register with NIXL, and find the memory to compute checksums of."""
        super().register_kv_caches(kv_caches)
        self._regions = self._find_regions(kv_caches)
        self._verifier.checksum_kind = KIND if self._regions else ""

    def _find_regions(self, kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The memory that NIXL reads blocks from. Empty where checksums cannot cover it: then holders attest."""
        views = [
            region_view(kv_caches.values(), base=base, block_bytes=size, stride_bytes=stride, blocks=blocks)
            for base, size, stride, blocks in private.block_regions(self)
        ]
        found = [view for view in views if view is not None]
        return found if len(found) == len(views) else []

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        """Start the step's pulls and their proofs. Hold the blocks of its new leases, free those of its releases."""
        for request_id, wanted in metadata.reqs_to_recv.items():
            if wanted.awaiting_kvs:
                assert wanted.remote is not None
                if wanted.remote.engine_id not in self._engines_met:
                    self._first_pulls[request_id] = (wanted.remote.engine_id, wanted.remote.host)
                holder = Holder(
                    host=wanted.remote.host,
                    port=wanted.remote.port,
                    engine_id=wanted.remote.engine_id,
                    request_id=wanted.remote.request_id,
                    rank=self.tp_rank,
                )
                self._verifier.begin(request_id, holder, [block for group in wanted.local_block_ids for block in group])
        super().start_load_kv(metadata)
        if not isinstance(metadata, BatonNixlMetadata):
            return
        # A reader that was faster than this step has ended its hold already.
        held = {name: blocks for name, blocks in metadata.baton_held.items() if private.is_tracked(self, name)}
        self._held_blocks.update(held)
        for request_id in held.keys() & metadata.baton_check.keys():
            self._note_checksums(request_id, metadata.baton_check[request_id])
        now_s = time.perf_counter()
        for request_id, lease_s in metadata.baton_renew.items():
            private.extend_lease(self, request_id, now_s + lease_s)
        for request_id in metadata.baton_release:
            if not private.stop_tracking(self, request_id):
                continue  # it was pulled from this rank, or its lease ran out
            self._released.add(request_id)
            self._dismissed[request_id] = None
        while len(self._dismissed) > _RELEASED_REMEMBERED_MAX:
            self._forget(next(iter(self._dismissed)))

    def get_transfer_results(self) -> KVConnectorTransferResults:
        """Stock results, plus the requests released in this step, minus the pulls that are not proved yet."""
        results = super().get_transfer_results()
        self._hold_back_unproved(results)
        if self._released:
            assert not self._released & results.finished_sending, "a released request was reported twice"
            results.finished_sending.update(self._released)
            self._released.clear()
        self._lost.update(results.finished_sending - self._pulled)
        self._pulled.clear()
        for request_id in results.finished_sending:
            self._held_blocks.pop(request_id, None)
        return results

    def take_metadata(self) -> BatonWorkerMetadata | None:
        """What the scheduler half does not know yet."""
        checksums: dict[str, dict[int, bytes]] = {}
        while self._checksums and (ready := self._checksums[0][1].ready()) is not None:
            request_id, _ = self._checksums.popleft()
            checksums[request_id] = {self.tp_rank: ready}
        lost, self._lost = self._lost, set()
        return BatonWorkerMetadata(checksums, lost) if checksums or lost else None

    def shutdown(self) -> None:
        """End the proofs too, and drop the views of the KV cache."""
        super().shutdown()
        self._pass_on_ucx_log()
        self._ucx_log.close()
        self._verifier.close()
        self._regions = []

    def _get_new_notifs(self) -> set[str]:
        """Requests whose every reader is done: their blocks have left this engine.

        A notification that comes after our release is normal: its reader was aborted.
        """
        with private.tracked(self, self._dismissed):
            pulled = super()._get_new_notifs()
        for request_id in pulled & self._dismissed.keys():
            self._forget(request_id)
            pulled.discard(request_id)
        self._pulled.update(pulled)
        for request_id in pulled:
            self.xfer_stats.data[BLOCKS_OUT].append(self._held_blocks.pop(request_id, 0))
        return pulled

    def _forget(self, request_id: str) -> None:
        del self._dismissed[request_id]
        private.forget_notifications(self, request_id)

    def _nixl_handshake(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        """Fail at once where nothing listens, instead of after the handshake's own 5 s.

        The handshake gets the address that answered: ZeroMQ cannot resolve a name that has only an IPv6 address.
        """
        with socket.create_connection((host, port), timeout=self._connect_timeout_s) as answered:
            address = answered.getpeername()[0]
        return super()._nixl_handshake(address, port, *args, **kwargs)

    def _hold_back_unproved(self, results: KVConnectorTransferResults) -> None:
        """Report to the scheduler only pulls that are proved, and pulls that failed."""
        if results.failed_recving:
            self._say_pull_failed(results.failed_recving)
        for request_id in results.finished_recving & results.failed_recving:
            self._verifier.drop(request_id)
        for request_id in results.finished_recving - results.failed_recving:
            if first := self._first_pulls.pop(request_id, None):
                self._name_transport(*first)
            self._verifier.read_done(request_id)
            results.finished_recving.discard(request_id)
        for request_id, (verdict, block_ids) in self._verifier.verdicts().items():
            self.xfer_stats.data[PULLS[verdict]].append(1)
            results.finished_recving.add(request_id)
            if verdict not in USABLE:
                log.warning(
                    "pulled KV is not used, its prompt is computed again", request_id=request_id, verdict=str(verdict)
                )
                results.failed_recving.add(request_id)
                private.report_load_failure(self, block_ids)

    def _name_transport(self, engine_id: str, host: str) -> None:
        """After the first pull from an engine: UCX has chosen by then, and says it once for each way to go."""
        self._first_pulls = {name: first for name, first in self._first_pulls.items() if first[0] != engine_id}
        if len(self._engines_met) >= _ENGINES_REMEMBERED_MAX:
            self._engines_met.clear()
        self._engines_met.add(engine_id)
        new = self._pass_on_ucx_log() - self._transports
        if not self._transports:
            new = new or {UNKNOWN}
        self._transports |= new
        self.xfer_stats.data[TRANSPORTS] += sorted(new)
        # Where nothing is new, this engine is reached by one of those that were named before.
        transport = " or ".join(sorted(new or self._transports))
        log.info("first pull of KV from an engine", transport=transport, engine=engine_id, host=host)

    def _say_pull_failed(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            self._first_pulls.pop(request_id, None)
        self._pass_on_ucx_log()
        if self._transport_required:
            log.error(
                "a pull of KV failed, and engine.transport_required leaves it no TCP to fall back on",
                transport_required=self._transport_required,
                requests=sorted(request_ids),
            )

    def _pass_on_ucx_log(self) -> set[str]:
        """Log what UCX has to say; the transports of pulls in it."""
        transports, rest = self._ucx_log.read()
        for line in rest:
            log.warning("UCX", said=line)
        return transports

    def _note_checksums(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Compute the checksums of newly held blocks: after the step that wrote them, before any later write."""
        if not self._regions or not block_ids:
            return
        self._checksums.append((request_id, PendingChecksums(block_checksums(self._regions, block_ids))))

    def _checksums_of(self, block_ids: Sequence[int]) -> PendingChecksums:
        """Checksums of blocks that were read. On CUDA they run on a stream that waits for no step of the model."""
        if self._regions[0].device.type != "cuda":
            return PendingChecksums(block_checksums(self._regions, block_ids))
        with torch.cuda.stream(torch.cuda.Stream(self._regions[0].device)):
            return PendingChecksums(block_checksums(self._regions, block_ids))
