"""Room for KV blocks: two filters and a score. Reserves nothing; ``core`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Ask


def could_hold(ask: Ask, worker: Worker) -> bool:
    """Whether the request would fit an empty worker."""
    within_context = worker.context_tokens_max == 0 or ask.computed_tokens <= worker.context_tokens_max
    return within_context and ask.blocks(worker.block_size_tokens) <= worker.blocks_total


class CapacityFilter:
    """Drops workers that could never hold the request."""

    name: Final = "kv_capacity"

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """The large enough ones."""
        # As could_hold, for all at once: this runs for every worker and request.
        needed = {size: ask.blocks(size) for size in {worker.block_size_tokens for worker in workers}}
        tokens = ask.computed_tokens
        return [
            worker
            for worker in workers
            if worker.blocks_total >= needed[worker.block_size_tokens]
            and (tokens <= worker.context_tokens_max or worker.context_tokens_max == 0)
        ]


class KvHeadroomFilter:
    """Drops workers that cannot hold the request now."""

    name: Final = "kv_headroom"

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """Those with enough free blocks."""
        sizes = {worker.block_size_tokens for worker in workers}
        needed = {size: ask.blocks(size) for size in sizes}
        return [worker for worker in workers if worker.free_blocks >= needed[worker.block_size_tokens]]


class KvHeadroomScorer:
    """Prefers the larger free share."""

    name: Final = "kv_headroom_score"

    def score(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[float]:
        """Free blocks over total blocks."""
        return [worker.free_blocks / worker.blocks_total for worker in workers]
