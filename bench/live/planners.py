"""Planners that know no prefixes, in a real scheduler: the tenant of a request says which of them places it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler.api.events import PlanRequested
from scheduler.cluster.model_pool import ModelPool
from scheduler.cluster.worker import Worker
from scheduler.routing.filters import Ask, Emptied, passing
from scheduler.routing.placement import NotPlaced, Placed, Planner, Reason

OURS, ROUND_ROBIN, LEAST_LOAD = "baton", "round_robin", "least_load"
PLANNERS = (OURS, ROUND_ROBIN, LEAST_LOAD)


class ByTenant(Planner):
    """Places a request as its tenant's name says; any other as ever."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._turn = 0

    def place(self, event: PlanRequested, pool: ModelPool, now_s: float) -> Placed | NotPlaced:
        """Choose the pair of workers of one request."""
        named = planner_of(event.tenant)
        # Workers that stay together have no pair to choose.
        if named not in (ROUND_ROBIN, LEAST_LOAD) or not pool.with_role("prefill"):
            return super().place(event, pool, now_s)
        ask = Ask(held_tokens=event.prompt_tokens + event.output_tokens_max, computed_tokens=event.prompt_tokens)
        prefills = passing("prefill", ask, pool.with_role("prefill"), now_s)
        decodes = passing("decode", ask, pool.with_role("decode"), now_s)
        # Both causes let a request wait in the scheduler, as with our planner.
        if isinstance(decodes, Emptied):
            return NotPlaced(cause="no_headroom", message="No decode worker has room now.")
        if isinstance(prefills, Emptied):
            return NotPlaced(cause="prefill_slots", message="Every prefill worker runs as many requests as it admits.")
        if named == ROUND_ROBIN:
            self._turn += 1
            prefill, decode = _at(prefills, self._turn), _at(decodes, self._turn)
        else:
            prefill = min(prefills, key=lambda worker: (len(worker.prompts), self._chance()))
            decode = min(decodes, key=lambda worker: (worker.request_count, self._chance()))
        return Placed(
            prefill=prefill,
            decode=decode,
            decode_blocks=ask.blocks(decode.block_size_tokens),
            reason=Reason.REMOTE,
            compute_s=prefill.latency.prefill_s(event.prompt_tokens, 0),
        )

    def _chance(self) -> float:
        """Equals share the work."""
        return self._rng.random() if self._rng is not None else 0.0


def planner_of(tenant: str) -> str:
    """As the client named it: front proxies mark a name that no key proves."""
    return tenant.removeprefix("name-")


def _at(workers: Sequence[Worker], turn: int) -> Worker:
    """In turn, by name, whatever order they come in."""
    return sorted(workers, key=lambda worker: worker.worker_id)[turn % len(workers)]
