"""Every touch of vLLM's NIXL connector, and of NIXL, that neither offers as an interface. One function a touch.

``docs/upstream.md`` says why each is needed and when it can go. Besides, three methods with an underscore are
overridden: ``_nixl_handshake_listener`` in ``scheduler``, ``_get_new_notifs`` and ``_nixl_handshake`` in ``worker``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import (
    NixlPullConnector,
    NixlPullConnectorScheduler,
    NixlPullConnectorWorker,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, NixlHandshakePayload
from vllm.distributed.nixl_utils import NixlWrapper

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig

_OF_ONE_ENGINE = frozenset(
    {"engine_id", "agent_metadata", "kv_caches_base_addr", "device_id", "num_blocks", "region_num_blocks"}
    | {"block_strides"}
)

# --- the connector


def init_without_halves(
    connector: NixlPullConnector, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
) -> None:
    """Initialise the connector without its stock halves, whose NIXL agent would be a second one."""
    NixlBaseConnector.__init__(connector, vllm_config, role, kv_cache_config)


def copy_metadata(stock: NixlConnectorMetadata, into: NixlConnectorMetadata) -> None:
    """Copy every field of a step's stock metadata into our subclass of it."""
    into.__dict__ |= stock.__dict__


# --- the scheduler half


def serve_handshakes(
    replies: dict[Any, Any], ready: threading.Event, stop: threading.Event, host: str, port: int
) -> None:
    """Run vLLM's handshake listener over our replies."""
    NixlPullConnectorScheduler._nixl_handshake_listener(replies, ready, stop, host, port)


def set_lease_end(half: NixlPullConnectorScheduler, request_id: str, ends_s: float) -> None:
    """Give one request's held KV another end than the connector-wide lease duration."""
    if request_id in half._reqs_need_send:
        half._reqs_need_send[request_id] = ends_s


def prefill_backoff(half: NixlPullConnectorScheduler) -> int:
    """Prompt tokens at the end that a prefill leaves off, and whose KV or state the taker computes itself."""
    return int(half._prefill_backoff())


def layout_facts(handshake: Mapping[tuple[int, int], NixlHandshakePayload]) -> dict[str, str]:
    """What two engines compare when they shake hands, as texts that are equal where the values are.

    Left out is what is of one engine alone, and the distance of blocks, which each side uses for itself.
    """
    facts: dict[str, str] = {}
    for rank, payload in handshake.items():
        told = msgspec.msgpack.decode(payload.agent_metadata_bytes)
        layout = {name: value for name, value in told.items() if name not in _OF_ONE_ENGINE}
        facts[f"nixl rank {rank}"] = payload.compatibility_hash + msgspec.json.encode(layout, order="sorted").decode()
    return facts


# --- the worker half


@contextlib.contextmanager
def progress_delay(delay_us: int) -> Iterator[None]:
    """Let the NIXL agent made inside wait ``delay_us`` between two looks at the network instead of spinning.

    NIXL's Python wrapper writes 0 into its agent's settings. Then a thread of every idle engine takes a whole core
    (measured: 1.00 core with 0, 0.005 core with 1 us). The wrapper offers no setting, so this exchanges the wrapper's
    settings class while the agent is constructed.
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


def block_regions(half: NixlPullConnectorWorker) -> list[tuple[int, int, int, int]]:
    """The memory that NIXL reads blocks from: base address, bytes a block, stride in bytes, blocks; a region each.

    Empty where that memory is not one plain list of blocks.
    """
    plain = (
        len(half.kv_cache_config.kv_cache_groups) == 1
        and half._physical_blocks_per_logical_kv_block == 1
        and not (half.use_host_buffer or half._has_mamba or half._mixed_mem_types or half.enable_permute_local_kv)
    )
    if not plain:
        return []
    return list(
        zip(
            half.kv_caches_base_addr[half.engine_id][half.tp_rank],
            half.block_len_per_layer,
            half.block_stride_per_layer,
            half.region_num_blocks,
            strict=True,
        )
    )


def is_tracked(half: NixlPullConnectorWorker, request_id: str) -> bool:
    """Whether this rank still waits for the readers of a request."""
    return request_id in half._reqs_to_process


def extend_lease(half: NixlPullConnectorWorker, request_id: str, until_s: float) -> None:
    """Move the end of a tracked request's lease to ``until_s``. Never shortens it."""
    if request_id in half._reqs_to_send:
        half._reqs_to_send[request_id] = max(half._reqs_to_send[request_id], until_s)


def stop_tracking(half: NixlPullConnectorWorker, request_id: str) -> bool:
    """Wait for no reader of a request any more. False where this rank has reported the request already."""
    if request_id not in half._reqs_to_process:
        return False
    half._reqs_to_process.remove(request_id)
    half._reqs_to_send.pop(request_id, None)
    return True


@contextlib.contextmanager
def tracked(half: NixlPullConnectorWorker, request_ids: Collection[str]) -> Iterator[None]:
    """Track these requests inside: stock takes a notification for an untracked one as a sign of corruption."""
    half._reqs_to_process.update(request_ids)
    try:
        yield
    finally:
        half._reqs_to_process.difference_update(request_ids)


def forget_notifications(half: NixlPullConnectorWorker, request_id: str) -> None:
    """Drop the count of readers that reported they were done with a request."""
    half.consumer_notification_counts_by_req.pop(request_id, None)
    half.expected_consumer_notifications_by_req.pop(request_id, None)


def report_load_failure(half: NixlPullConnectorWorker, block_ids: Collection[int]) -> None:
    """Tell vLLM that these blocks hold nothing usable. A hybrid cache tells it by the failed request alone."""
    if not half._is_hma_required:
        half._invalid_block_ids.put(set(block_ids))
