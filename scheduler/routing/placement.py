"""Chooses one request's workers, prefill and decode together. Reads a pool; reserves and stores nothing."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

from scheduler.api.chance import Random
from scheduler.api.events import PlanRequested
from scheduler.cluster.model_pool import ModelPool
from scheduler.cluster.worker import Worker
from scheduler.config import SchedulerParameters
from scheduler.routing.cost_model import cheapest
from scheduler.routing.filters import Ask, Emptied, decode_filters, kv_capacity, passing, prefill_filters

Cause = Literal[
    "plans_in_flight",
    "plan_id_in_use",
    "no_worker",
    "too_large",
    "no_headroom",
    "decode_slots",
    "prefill_slots",
    "prefill_backlog",
    "wait_too_long",
    "queue_full",
    "waited_out",
]


class Reason(enum.StrEnum):
    """Why a plan has the shape it has. Travels in ``Plan.reason`` and labels a metric."""

    REMOTE = "remote"
    SHORT_PROMPT = "short_prompt"
    NO_PREFILL_WORKER = "no_prefill_worker"
    PINNED = "pinned"
    PREFILL_ONLY = "prefill_only"


class Placed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where a request runs. ``decode_blocks`` is what to reserve; 0 without a decode worker."""

    prefill: Worker | None
    decode: Worker | None
    decode_blocks: int
    reason: Reason


class NotPlaced(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request runs nowhere now."""

    cause: Cause
    message: str


class Planner:
    """Filters the workers of each role, then takes the cheapest pair."""

    def __init__(self, config: SchedulerParameters, rng: Random | None) -> None:
        self._config = config
        self._prefill = prefill_filters(config.prefill_wait_max_s)
        self._decode = decode_filters()
        self._rng = rng

    def place(self, event: PlanRequested, pool: ModelPool, now_s: float) -> Placed | NotPlaced:
        """Choose the worker, or the pair of workers, of one request."""
        if event.prefill_only and not _hides_tokens(pool):
            return self._place_prefill_only(event, pool, now_s)
        reserve = min(event.output_tokens_max, self._config.output_reserve_tokens)
        held_tokens = event.prompt_tokens + reserve
        if event.pinned_decode_worker_id is not None:
            placed = self._place_pinned(event, held_tokens, pool, now_s)
            if placed is not None:
                return placed
        ask = Ask(
            held_tokens=held_tokens,
            computed_tokens=event.prompt_tokens,
            excluded_worker_ids=event.excluded_worker_ids,
        )
        decodes = passing(self._decode, ask, pool.with_role("decode"), now_s)
        if isinstance(decodes, Emptied):
            return _decode_refusal(ask, decodes, pool)
        # Moving a short prompt's KV costs more than computing the prompt beside the running decodes.
        if event.prompt_tokens <= self._config.short_prompt_tokens:
            return self._cheapest((), decodes, ask, Reason.SHORT_PROMPT)
        prefills = passing(self._prefill, _prefill_ask(event), pool.with_role("prefill"), now_s)
        if isinstance(prefills, Emptied):
            busy = _prefill_busy(prefills)
            return busy or self._cheapest((), decodes, ask, Reason.NO_PREFILL_WORKER)
        return self._cheapest(prefills, decodes, ask, Reason.REMOTE)

    def _place_pinned(self, event: PlanRequested, held_tokens: int, pool: ModelPool, now_s: float) -> Placed | None:
        """Use the sibling's worker, which has the prompt's full blocks; None if it cannot take the request."""
        pinned = [one for one in pool.with_role("decode") if one.worker_id == event.pinned_decode_worker_id]
        ask = Ask(
            held_tokens=held_tokens,
            shared_tokens=event.prompt_tokens,
            excluded_worker_ids=event.excluded_worker_ids,
        )
        decodes = passing(self._decode, ask, pinned, now_s)
        return None if isinstance(decodes, Emptied) else self._cheapest((), decodes, ask, Reason.PINNED)

    def _place_prefill_only(self, event: PlanRequested, pool: ModelPool, now_s: float) -> Placed | NotPlaced:
        ask = _prefill_ask(event)
        prefills = passing(self._prefill, ask, pool.with_role("prefill"), now_s)
        if not isinstance(prefills, Emptied):
            return self._cheapest(prefills, (), ask, Reason.PREFILL_ONLY)
        if (busy := _prefill_busy(prefills)) is not None:
            return busy
        # Nothing is handed over, so any engine can compute the prompt and its one token.
        decodes = passing(self._decode, ask, pool.with_role("decode"), now_s)
        if isinstance(decodes, Emptied):
            return _decode_refusal(ask, decodes, pool)
        return self._cheapest((), decodes, ask, Reason.NO_PREFILL_WORKER)

    def _cheapest(self, prefills: Sequence[Worker], decodes: Sequence[Worker], ask: Ask, reason: Reason) -> Placed:
        prefill, decode = cheapest(prefills, decodes, self._rng)
        return Placed(
            prefill=prefill,
            decode=decode,
            decode_blocks=ask.blocks(decode.block_size_tokens) if decode is not None else 0,
            reason=reason,
        )


def _hides_tokens(pool: ModelPool) -> bool:
    """Whether a prefill shows no token, so that even a single one needs a decode worker. Workers of a pool agree."""
    return any(worker.info.prefill_backoff_tokens for worker in pool.with_role("prefill"))


def _prefill_ask(event: PlanRequested) -> Ask:
    """A prefill worker holds the prompt; its one output token needs no KV there."""
    return Ask(
        held_tokens=event.prompt_tokens,
        computed_tokens=event.prompt_tokens,
        excluded_worker_ids=event.excluded_worker_ids,
    )


def _prefill_busy(emptied: Emptied) -> NotPlaced | None:
    """The refusal if all prefill workers are full; None for another cause."""
    match emptied.by:
        case "request_slots":
            return NotPlaced(cause="prefill_slots", message="Every prefill worker runs as many requests as it admits.")
        case "prefill_backlog":
            return NotPlaced(cause="prefill_backlog", message="Every prefill worker has enough prompts to compute.")
        case _:
            return None


def _decode_refusal(ask: Ask, emptied: Emptied, pool: ModelPool) -> NotPlaced:
    """Name the most lasting cause: it can never fit, no worker is ready, or it does not fit now."""
    registered = pool.with_role("decode")
    if registered and not kv_capacity(ask, registered, 0.0):
        context = max(worker.context_tokens_max or sys.maxsize for worker in registered)
        if ask.computed_tokens > context:
            message = (
                f"The prompt has {ask.computed_tokens} tokens; the longest context of a decode worker is {context}."
            )
            return NotPlaced(cause="too_large", message=message)
        largest = max(worker.blocks_total * worker.block_size_tokens for worker in registered)
        message = f"The request needs room for {ask.held_tokens} tokens; the largest decode worker has {largest}."
        return NotPlaced(cause="too_large", message=message)
    match emptied.by:
        case "kv_headroom":
            missing = min(ask.blocks(worker.block_size_tokens) - worker.free_blocks for worker in emptied.dropped)
            assert missing > 0
            message = f"No decode worker has room now; {missing} KV blocks are missing."
            return NotPlaced(cause="no_headroom", message=message)
        case "request_slots":
            message = "Every decode worker with room runs as many requests as it admits."
            return NotPlaced(cause="decode_slots", message=message)
        case _:
            return NotPlaced(cause="no_worker", message="No decode worker is ready for this request.")
