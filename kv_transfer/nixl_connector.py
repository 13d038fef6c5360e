"""vLLM's NIXL pull connector with exact take-over and release by message. Never decides who pulls from whom.

Five things differ from the stock connector, all through methods it offers for overriding:

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
5. A peer whose process is gone is found out by one connect before the handshake, which would take 5 s, one peer
   after the other. The load then counts as failed, and ``kv_load_failure_policy`` "recompute" computes the prompt here.

Params Baton adds to vLLM's: ``baton_lease`` (lease id) and ``baton_lease_s`` (seconds to keep the KV) on a prefill.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import (
    NixlPullConnector,
    NixlPullConnectorScheduler,
    NixlPullConnectorWorker,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG, NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.distributed.nixl_utils import NixlWrapper

from kv_transfer import block_sums, holder_book
from kv_transfer.pull_proof import USABLE, Verdict
from kv_transfer.pull_prover import Holder, PullProver, SideChannelLines
from runtime.orphan import stop_with_parent

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

LEASE = "baton_lease"
LEASE_S = "baton_lease_s"
RELEASE = "baton_release"
RENEW = "baton_renew"
# Keys of kv_connector_extra_config.
SIDE_CHANNEL_HOST = "baton_side_channel_host"
SIDE_CHANNEL_PORT = "baton_side_channel_port"
PROGRESS_DELAY_US = "baton_progress_delay_us"
CHECK_FRACTION = "baton_check_fraction"
PROOF_TIMEOUT_S = "baton_proof_timeout_s"
CONNECT_TIMEOUT_S = "baton_connect_timeout_s"
# Keys of NixlKVConnectorStats.data; lists of numbers, as all its values.
BLOCKS_OUT = "baton_blocks_out"
LEASES_RELEASED = "baton_leases_released"
PULLED_AFTER_RELEASE = "baton_pulled_after_release"
PULLS = {verdict: f"baton_pulls_{verdict}" for verdict in Verdict}
_OWN_KEYS = (BLOCKS_OUT, LEASES_RELEASED, PULLED_AFTER_RELEASE, *PULLS.values())
# Where the engine's settings do not say; Baton's always do.
_TIMEOUT_S = 2.0
_RELEASED_REMEMBERED_MAX = 4096


def _question(request_id: str, rank: int) -> bytes:
    return holder_book.question(GET_META_MSG, request_id, rank)


class BatonNixlStats(NixlKVConnectorStats):
    """Stock counters and ours.

    Serving: blocks pulled from here, leases released, pulls that crossed a release. Pulling: verdicts on pulls.
    """

    def reset(self) -> None:
        """Empty every list."""
        super().reset()
        self.data.update({key: [] for key in _OWN_KEYS})

    def is_empty(self) -> bool:
        """Whether this interval has nothing to report."""
        return super().is_empty() and not any(self.data[key] for key in _OWN_KEYS)


class BatonNixlMetadata(NixlConnectorMetadata):
    """What the scheduler half tells the worker halves with a step."""

    def __init__(self) -> None:
        super().__init__()
        self.baton_held: dict[str, int] = {}
        self.baton_release: set[str] = set()
        # Seconds to keep from now, by request.
        self.baton_renew: dict[str, float] = {}
        # Block ids to compute checksums of, by request.
        self.baton_check: dict[str, list[int]] = {}


class BatonWorkerMetadata(KVConnectorWorkerMetadata):
    """What the worker halves tell the scheduler half after a step."""

    def __init__(self, sums: dict[str, dict[int, bytes]], lost: set[str]) -> None:
        # By request and rank.
        self.sums = sums
        # Requests that some rank let go of before its readers were done.
        self.lost = lost

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both ranks' words."""
        assert isinstance(other, BatonWorkerMetadata)
        sums = {request_id: self.sums.get(request_id, {}) | ranks for request_id, ranks in other.sums.items()}
        return BatonWorkerMetadata(self.sums | sums, self.lost | other.lost)


class BatonNixlScheduler(NixlPullConnectorScheduler):
    """Scheduler half: counts tokens to take over, knows the request behind a lease, answers for what it holds."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        config = vllm_config.kv_transfer_config
        assert config is not None
        # By value, not by vLLM's environment variables: two engines may start in one process.
        host: str = config.get_from_extra_config(SIDE_CHANNEL_HOST, "")
        self.side_channel_host = host or envs.VLLM_NIXL_SIDE_CHANNEL_HOST
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
        self._book = holder_book.HolderBook(engine_id, block_sums.KIND)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens to pull beyond ``num_computed_tokens``, and whether the pull is asynchronous."""
        params = request.kv_transfer_params
        if params is not None and params.get("do_remote_prefill") and params.get("remote_num_tokens"):
            covered = min(int(params["remote_num_tokens"]), request.num_prompt_tokens)
            count = covered - num_computed_tokens
            return (count, True) if count > 0 else (0, False)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Note a lease that begins here, or the leases that a release message names."""
        params = request.kv_transfer_params
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
            self._book.hold(request_id)
            if len(answer["remote_block_ids"]) == 1 and self._is_checked(params[LEASE]):
                self._to_check[request_id] = list(answer["remote_block_ids"][0])
            if request_id in self._reqs_need_send and LEASE_S in params:
                self._reqs_need_send[request_id] = time.perf_counter() + float(params[LEASE_S])
        return delay_free, answer

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Stock metadata with what was held and released since the last step."""
        stock = super().build_connector_meta(scheduler_output)
        meta = BatonNixlMetadata()
        meta.__dict__ |= stock.__dict__
        meta.baton_held, self._newly_held = self._newly_held, {}
        meta.baton_release, self._to_release = self._to_release, set()
        meta.baton_renew, self._to_renew = self._to_renew, {}
        meta.baton_check, self._to_check = self._to_check, {}
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Learn what the worker halves say; forget the leases whose blocks are about to be freed."""
        super().update_connector_output(connector_output)
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, BatonWorkerMetadata):
            self._lost |= told.lost
            for request_id, ranks in told.sums.items():
                for rank, sums in ranks.items():
                    self._book.learn(request_id, rank, sums)
        for request_id in connector_output.finished_sending or ():
            lease = self._lease_by_request.pop(request_id, None)
            if lease is not None:
                self._request_by_lease.pop(lease, None)
            self._to_release.discard(request_id)
            self._to_renew.pop(request_id, None)
            self._to_check.pop(request_id, None)
            # The blocks are free behind this call: from now on nobody may be told that they are held.
            self._book.end(request_id, pulled=request_id not in self._lost)
            self._lost.discard(request_id)

    def _is_checked(self, lease: str) -> bool:
        return holder_book.is_checked(lease, self._check_fraction)

    def _nixl_handshake_listener(
        self,
        encoded_data: dict[tuple[int, int], Any],
        ready_event: threading.Event,
        stop_event: threading.Event,
        host: str,
        port: int,
    ) -> None:
        """The stock thread, which answers what it finds in ``encoded_data``; there it finds our answers too."""
        answers = holder_book.Answers(encoded_data, self._book)
        NixlPullConnectorScheduler._nixl_handshake_listener(answers, ready_event, stop_event, host, port)

    def _release(self, leases: list[str]) -> None:
        """Unknown leases were pulled, ran out or never began: nothing to do."""
        self._to_release.update(self._request_by_lease[lease] for lease in leases if lease in self._request_by_lease)

    def _renew(self, leases: dict[str, float]) -> None:
        """Unknown leases have ended: what ended does not come back."""
        for lease, lease_s in leases.items():
            if (request_id := self._request_by_lease.get(lease)) is not None:
                self._to_renew[request_id] = float(lease_s)


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


class BatonNixlWorker(NixlPullConnectorWorker):
    """Worker half: pulls, serves pulls, and lets go of released requests."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        config = vllm_config.kv_transfer_config
        assert config is not None
        with progress_delay(config.get_from_extra_config(PROGRESS_DELAY_US, 0)):
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
        self._prover = PullProver(lines=SideChannelLines(_question), timeout_s=self._proof_timeout_s)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register with NIXL, and find the memory whose checksums are computed."""
        super().register_kv_caches(kv_caches)
        self._regions = self._find_regions(kv_caches)
        if self._regions:
            self._prover.close()
            self._prover = PullProver(
                lines=SideChannelLines(_question),
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
                log.warning("the KV pulled for request %s is %s and computed again", request_id, verdict)
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
