"""What the halves of Baton's NIXL connector tell each other, count and are told. Holds values; decides nothing."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG, NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from kv_transfer import holder_book
from kv_transfer.pull_proof import Verdict

# Keys of a request's kv_transfer_params.
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


def question(request_id: str, rank: int) -> bytes:
    """What a taker asks the holder of its KV on the side channel."""
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
