"""Which workers may take a request. Each filter reads ``Worker`` and ``Ask``, changes nothing and drops some workers.

Filters are not configured: each guards a promise, so all always run. To add one, write the function, name it in
``FILTERS``, and add its condition to ``strictly``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from runtime.roles import WorkerRole
from scheduler.cluster.worker import Worker


class Ask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one request asks of one worker."""

    # Tokens whose KV must have room until the request ends.
    held_tokens: int
    # Leading tokens whose full blocks already lie on the worker, shared with a sibling.
    shared_tokens: int = 0
    # Prompt tokens the worker would compute.
    computed_tokens: int = 0
    excluded_worker_ids: frozenset[str] = frozenset()

    def blocks(self, block_size_tokens: int) -> int:
        """Blocks of this size that the request would add."""
        return max(1, -(-self.held_tokens // block_size_tokens) - self.shared_tokens // block_size_tokens)


class Filter(NamedTuple):
    """``keep`` returns the workers that pass, in the given order."""

    name: str
    keep: Callable[[Ask, Sequence[Worker], float], Sequence[Worker]]


class Emptied(msgspec.Struct, frozen=True, gc=False):
    """No worker is left. ``by`` names the filter that dropped the last of them; empty when there was none at all."""

    by: str
    dropped: Sequence[Worker] = ()


def passing(role: WorkerRole, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker] | Emptied:
    """The workers of one pool and role that pass every filter; at least one."""
    if not workers:
        return Emptied("")
    if left := strictly(role, ask, workers, now_s):
        return left
    for name, keep in FILTERS[role]:
        left = keep(ask, workers, now_s)
        if not left:
            return Emptied(name, workers)
        workers = left
    return workers


def strictly(role: WorkerRole, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
    """Those of the workers that pass and that no filter has to make an exception for, in one pass over them.

    None for a request that names workers that failed it.
    """
    if ask.excluded_worker_ids or not workers:
        return ()
    blocks, tokens = ask.blocks(workers[0].block_size_tokens), ask.computed_tokens
    if role == "decode":
        return [
            worker
            for worker in workers
            if worker.free_blocks >= blocks
            and worker.request_count < worker.requests_max
            and worker.ready
            and not worker.avoided
            and worker.suspect_until_s <= now_s
            and worker.context_tokens_max >= tokens
        ]
    return [
        worker
        for worker in workers
        if worker.request_count < worker.requests_max
        and worker.ready
        and not worker.avoided
        and worker.suspect_until_s <= now_s
        and worker.blocks_total >= blocks
        and worker.context_tokens_max >= tokens
    ]


def excluded(ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
    """Drop the workers that the request names: they failed it before."""
    if not ask.excluded_worker_ids:
        return workers
    return [worker for worker in workers if worker.worker_id not in ask.excluded_worker_ids]


def in_service(ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
    """Drop workers that are starting, draining, stopped or silent, and ejected ones while another one is there.

    A worker that may work is better than none.
    """
    kept = [worker for worker in workers if worker.ready and not worker.avoided]
    return kept or [worker for worker in workers if worker.ready]


def kv_capacity(ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
    """Drop workers that could never hold the request, not even empty."""
    # Workers of one pool have one layout, and so one block size.
    blocks, tokens = ask.blocks(workers[0].block_size_tokens), ask.computed_tokens
    return [worker for worker in workers if worker.blocks_total >= blocks and worker.context_tokens_max >= tokens]


def kv_headroom(ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
    """Drop workers that cannot hold the request now."""
    blocks = ask.blocks(workers[0].block_size_tokens)
    return [worker for worker in workers if worker.free_blocks >= blocks]


def request_slots(ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
    """Drop workers that would refuse one more request."""
    return [worker for worker in workers if worker.request_count < worker.requests_max]


def suspect(ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
    """Drop workers that a front proxy lately could not use, while another one is left. Alone it refuses no request."""
    return [worker for worker in workers if worker.suspect_until_s <= now_s] or workers


_FIRST = (
    Filter("excluded", excluded),
    Filter("in_service", in_service),
    Filter("kv_capacity", kv_capacity),
)
_LAST = Filter("suspect", suspect)
FILTERS: Mapping[WorkerRole, Sequence[Filter]] = {
    # A prompt waits in a prefill worker's queue for blocks, so they need not be free now.
    "prefill": (*_FIRST, Filter("request_slots", request_slots), _LAST),
    # On a decode worker blocks are reserved, so they must be free now.
    "decode": (*_FIRST, Filter("kv_headroom", kv_headroom), Filter("request_slots", request_slots), _LAST),
}
