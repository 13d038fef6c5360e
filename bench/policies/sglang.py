"""SGLang's router (sgl-model-gateway, now SMG)."""

from __future__ import annotations

import operator
from typing import ClassVar, Literal

from bench.policies.plain import less_loaded_of_two
from bench.policies.seen import PeerPolicy, Seen, least
from simulation.replay.policy import Request

# The library's defaults; its command line has 0.3, 64 and 1.5.
CACHE_THRESHOLD = 0.5
BALANCE_ABS_THRESHOLD = 32
BALANCE_REL_THRESHOLD = 1.1


def imbalanced(loads: list[int]) -> bool:
    """Whether the numbers of requests in flight differ so much that prefixes do not count."""
    most, fewest = max(loads), min(loads)
    return most - fewest > BALANCE_ABS_THRESHOLD and most > BALANCE_REL_THRESHOLD * fewest


class SglangCacheAware(PeerPolicy):
    """``cache_aware`` over the approximate tree for prefill, ``power_of_two`` for decode.

    model_gateway/src/policies/cache_aware.rs (lightseekorg/smg 1053321): out of balance the shortest queue; else the
    worker of the longest match if that is more than the threshold; else the shortest queue.
    """

    blocks_from: ClassVar[Literal["events", "decisions"]] = "decisions"

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """The longest match while loads are balanced."""
        if not imbalanced([worker.requests for worker in self.prefills]):
            best = least(self.prefills, lambda worker: -worker.held_share(request), self.rng)
            if best.held_share(request) > CACHE_THRESHOLD:
                return best
        return least(self.prefills, operator.attrgetter("requests"), self.rng)

    def choose_decode(self, request: Request, now_s: float) -> Seen:
        """The less loaded of two."""
        return less_loaded_of_two(self.decodes, self.rng)


class SmgCacheAware(SglangCacheAware):
    """The same with KV events (SMG over gRPC): the largest overlap, whatever its size; ties by load."""

    blocks_from = "events"

    def choose_prefill(self, request: Request, now_s: float) -> Seen:
        """The longest match while loads are balanced; the shortest queue without any match."""
        if imbalanced([worker.requests for worker in self.prefills]):
            return least(self.prefills, operator.attrgetter("requests"), self.rng)
        longest = max(worker.blocks.leading(request.block_keys) for worker in self.prefills)
        holders = [one for one in self.prefills if one.blocks.leading(request.block_keys) == longest]
        return least(holders, operator.attrgetter("requests"), self.rng)
