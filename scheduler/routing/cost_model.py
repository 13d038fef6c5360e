"""What a pair of workers would cost a request, in seconds, and which pair costs least. Reads workers, changes nothing.

A cost is the time that the request is expected to lose there. The predicted queue is in seconds already. The number of
requests and the used share of the KV cache are converted by the weights below. What depends on both workers, such as
the transfer of KV or a prefix that one of them holds, belongs in ``cost_s``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from scheduler.api.chance import Random
from scheduler.cluster.worker import Worker

PAIR_CANDIDATES_MAX = 4
"""The cheapest workers of each side whose pairs are compared."""
COST_TOLERANCE_S = 1e-9
"""Costs closer than this are equal: the order of a float sum must not decide."""


class Weights(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How the load of one worker is converted to seconds."""

    # Per request that the worker has.
    request_s: float
    # For a KV cache that is full; in proportion below that.
    full_kv_s: float


PREFILL = Weights(request_s=0.02, full_kv_s=0.3)
"""Computation bounds a prefill worker, and the queue says how much of it is ahead. A request costs about one scheduling
step. A full cache makes a prompt wait until decode workers have pulled others."""
DECODE = Weights(request_s=0.01, full_kv_s=1.0)
"""Memory bounds a decode worker: near a full cache, requests are preempted or wait for others to end. One more request
lengthens each step by about 0.05 ms, which is 0.01 s over 200 output tokens."""


class Candidate(NamedTuple):
    """A worker and its part of the cost."""

    cost_s: float
    worker: Worker


def worker_costs_s(workers: Sequence[Worker], weights: Weights) -> list[float]:
    """The part of each worker of one side."""
    request_s, full_kv_s = weights.request_s, weights.full_kv_s
    return [
        worker.queued_tokens / worker.speed.tokens_per_s
        + request_s * worker.request_count
        + full_kv_s * (1.0 - worker.free_blocks / worker.blocks_total)
        for worker in workers
    ]


def cost_s(prefill: Candidate | None, decode: Candidate | None) -> float:
    """The cost of a pair; a side that the request does not need is None."""
    return (prefill.cost_s if prefill is not None else 0.0) + (decode.cost_s if decode is not None else 0.0)


def cheapest(
    prefills: Sequence[Worker], decodes: Sequence[Worker], rng: Random | None
) -> tuple[Worker | None, Worker | None]:
    """The prefill and the decode worker that cost least; chance decides between equals, so that equals share the work.

    A side that the request does not need is empty, and None. Without ``rng`` the least worker ids win.
    """
    assert prefills or decodes
    pairs = [
        (cost_s(prefill, decode), prefill, decode)
        for prefill in _candidates(prefills, PREFILL, rng)
        for decode in _candidates(decodes, DECODE, rng)
    ]
    pairs.sort(key=operator.itemgetter(0))
    least_s = pairs[0][0] + COST_TOLERANCE_S
    equals = 1
    while equals < len(pairs) and pairs[equals][0] <= least_s:
        equals += 1
    _, prefill, decode = pairs[0]
    if equals > 1 and rng is not None:
        _, prefill, decode = pairs[int(rng.random() * equals)]
    elif equals > 1:
        _, prefill, decode = min(pairs[:equals], key=_ids)
    return prefill.worker if prefill is not None else None, decode.worker if decode is not None else None


def _candidates(workers: Sequence[Worker], weights: Weights, rng: Random | None) -> Sequence[Candidate | None]:
    """The cheapest of one side. Where more are equal than there is room for, chance decides."""
    if not workers:
        return (None,)
    costs = worker_costs_s(workers, weights)
    if len(workers) <= PAIR_CANDIDATES_MAX:
        return [Candidate(cost, worker) for cost, worker in zip(costs, workers, strict=True)]
    bound = sorted(costs)[PAIR_CANDIDATES_MAX - 1]
    found = [Candidate(cost, worker) for cost, worker in zip(costs, workers, strict=True) if cost <= bound]
    if len(found) > PAIR_CANDIDATES_MAX:
        below = [one for one in found if one.cost_s < bound]
        equal = [one for one in found if one.cost_s == bound]
        if rng is None:
            equal.sort(key=lambda one: one.worker.worker_id)
        else:
            first = int(rng.random() * len(equal))
            equal = equal[first:] + equal[:first]
        found = (below + equal)[:PAIR_CANDIDATES_MAX]
    return found


_Pair = tuple[float, Candidate | None, Candidate | None]


def _ids(pair: _Pair) -> list[str]:
    return [one.worker.worker_id for one in pair[1:] if one is not None]
