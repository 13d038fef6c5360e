"""What a pair of workers would cost a request, term by term: the answer to "why this worker?". Values only."""

from __future__ import annotations

import msgspec


class WorkerCost(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One worker's part, in seconds; ``scheduler/routing/cost_model.py`` says how each term is converted."""

    worker_id: str
    queue_s: float
    requests_s: float
    kv_s: float


class PairCost(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One candidate pair and its cost. A side that the plan does not need is None."""

    cost_s: float
    prefill: WorkerCost | None
    decode: WorkerCost | None
