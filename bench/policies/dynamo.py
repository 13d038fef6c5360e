"""NVIDIA Dynamo's KV-aware router."""

from __future__ import annotations

from bench.policies.seen import PeerPolicy, Seen, least
from simulation.replay.policy import Request

# ``--router-kv-overlap-score-credit``, ``--router-host-cache-hit-weight``, ``--router-disk-cache-hit-weight``.
DEVICE_CREDIT, HOST_CREDIT, DISK_CREDIT = 1.0, 0.75, 0.25
# ``--router-prefill-load-scale``.
PREFILL_LOAD_SCALE = 1.0


def overlap_credit(device_blocks: float, host_blocks: float = 0.0, disk_blocks: float = 0.0) -> float:
    """Blocks that need not be computed, each by what its tier is worth."""
    return DEVICE_CREDIT * device_blocks + HOST_CREDIT * host_blocks + DISK_CREDIT * disk_blocks


def cost(raw_prefill_blocks: float, credit_blocks: float, decode_blocks: float) -> float:
    """``prefill_load_scale * adjusted_prefill_blocks + decode_blocks``; lowest wins."""
    return PREFILL_LOAD_SCALE * max(raw_prefill_blocks - credit_blocks, 0.0) + decode_blocks


class DynamoKv(PeerPolicy):
    """``--router-mode kv`` with its defaults, temperature 0 (ai-dynamo/dynamo docs/components/router/).

    The formula stands in router-concepts.md, the credits and the scale in router-configuration.md. In disaggregated
    serving the prefill side counts no decode blocks (``--no-router-track-active-blocks``), and the decode side no
    overlap (router-disaggregated-serving.md). Reports name no tier yet, so all that is held counts as device blocks.
    """

    blocks_from = "events"

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """Active and new prompt blocks, less the overlap."""

        def cost_of(worker: Seen) -> float:
            size = worker.info.block_size_tokens
            raw_blocks = (worker.tokens + request.prompt_tokens) / size
            return cost(raw_blocks, overlap_credit(worker.held_tokens(request) / size), 0.0)

        return least(self.prefills, cost_of, self.rng)

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """Blocks of the requests that run there, and of this one."""

        def cost_of(worker: Seen) -> float:
            return cost(0.0, 0.0, (worker.tokens + request.prompt_tokens) / worker.info.block_size_tokens)

        return least(self.decodes, cost_of, self.rng)
