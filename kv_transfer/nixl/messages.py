"""Messages between the halves of Baton's NIXL connector, their counters, and the keys of their settings."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from kv_transfer.integrity.transfer_proof import TransferVerdict

# Keys of kv_connector_extra_config.
SIDE_CHANNEL_HOST = "baton_side_channel_host"
SIDE_CHANNEL_BIND_ADDRESS = "baton_side_channel_bind_address"
SIDE_CHANNEL_PORT = "baton_side_channel_port"
PROGRESS_DELAY_US = "baton_progress_delay_us"
CHECK_FRACTION = "baton_check_fraction"
PROOF_TIMEOUT_S = "baton_proof_timeout_s"
CONNECT_TIMEOUT_S = "baton_connect_timeout_s"
TRANSPORT_REQUIRED = "baton_transport_required"
# Keys of NixlKVConnectorStats.data. Their values are lists of numbers, like all of its values.
BLOCKS_OUT = "baton_blocks_out"
PULLS = {verdict: f"baton_pulls_{verdict}" for verdict in TransferVerdict}
TRANSPORTS = "baton_transports"
"""Texts, the one exception: transports that were seen for the first time."""
_OWN_KEYS = (BLOCKS_OUT, TRANSPORTS, *PULLS.values())


class BatonNixlStats(NixlKVConnectorStats):
    """Stock counters and ours: on the holder blocks pulled from it, on the taker verdicts."""

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

    def __init__(self, checksums: dict[str, dict[int, bytes]], lost: set[str]) -> None:
        # By request and rank.
        self.checksums = checksums
        # Requests that some rank released before its readers were done.
        self.lost = lost

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """What both ranks report."""
        assert isinstance(other, BatonWorkerMetadata)
        merged = {name: self.checksums.get(name, {}) | ranks for name, ranks in other.checksums.items()}
        return BatonWorkerMetadata(self.checksums | merged, self.lost | other.lost)
