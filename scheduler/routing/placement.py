"""The workers of one request, prefill and decode together. Reads the cluster, reserves nothing, remembers nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from scheduler.api.events import PlanRequested
from scheduler.api.worker_info import Role
from scheduler.cluster.state import ClusterState, Worker
from scheduler.config import SchedulerConfig
from scheduler.routing import policies
from scheduler.routing.disaggregation import Reason, wants_remote_prefill
from scheduler.routing.policies.kv_headroom import could_hold
from scheduler.routing.profile import Ask, Emptied, Picked, Probe, Random

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


class Chosen(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where a request runs. ``decode_blocks`` is what to reserve; 0 without a decode worker."""

    prefill: Worker | None
    decode: Worker | None
    decode_blocks: int
    reason: Reason


class NotPlaced(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request runs nowhere now. ``missing_blocks`` is the smallest shortage among workers it would fit."""

    cause: Cause
    message: str
    missing_blocks: int = 0


class Planner:
    """The two profiles and how their verdicts combine."""

    def __init__(self, config: SchedulerConfig, rng: Random | None, probe: Probe | None) -> None:
        self._config = config
        self._prefill = policies.prefill_profile(config.routing.prefill, config.prefill_wait_max_s)
        self._decode = policies.decode_profile(config.routing.decode)
        self._rng = rng
        self._probe = probe

    def place(self, event: PlanRequested, cluster: ClusterState, now_s: float) -> Chosen | NotPlaced:
        """Choose the worker, or the pair of workers, of one request."""
        if event.prefill_only:
            return self._place_prefill_only(event, cluster, now_s)
        reserve = min(event.output_tokens_max, self._config.output_reserve_tokens)
        held_tokens = event.prompt_tokens + reserve
        if event.pinned_decode_worker_id is not None:
            chosen = self._place_pinned(event, held_tokens, cluster, now_s)
            if chosen is not None:
                return chosen
        decode_ask = Ask(
            held_tokens=held_tokens,
            computed_tokens=event.prompt_tokens,
            excluded_worker_ids=event.excluded_worker_ids,
        )
        decodes = self._decode.survivors(decode_ask, cluster.with_role(Role.DECODE), now_s, self._probe)
        if isinstance(decodes, Emptied):
            return _decode_refusal(decode_ask, decodes, cluster)
        if not wants_remote_prefill(event.prompt_tokens, self._config.short_prompt_tokens):
            return self._local(decode_ask, decodes.workers, Reason.SHORT_PROMPT, now_s)
        prefill_ask = _prefill_ask(event)
        prefills = self._prefill.survivors(prefill_ask, cluster.with_role(Role.PREFILL), now_s, self._probe)
        if isinstance(prefills, Emptied):
            if (busy := _prefill_busy(prefills)) is not None:
                return busy
            return self._local(decode_ask, decodes.workers, Reason.NO_PREFILL_WORKER, now_s)
        # All workers have one KV layout, so every pair is possible and the best pair is the best of each side.
        prefill = self._prefill.best(prefill_ask, prefills.workers, now_s, self._rng, self._probe)
        decode = self._decode.best(decode_ask, decodes.workers, now_s, self._rng, self._probe)
        return _chosen(prefill.worker, decode.worker, decode_ask, Reason.REMOTE)

    def _local(self, ask: Ask, decodes: Sequence[Worker], reason: Reason, now_s: float) -> Chosen:
        decode = self._decode.best(ask, decodes, now_s, self._rng, self._probe).worker
        return _chosen(None, decode, ask, reason)

    def _place_pinned(
        self, event: PlanRequested, held_tokens: int, cluster: ClusterState, now_s: float
    ) -> Chosen | None:
        """Stay with the sibling, whose full prompt blocks are shared; None where that worker cannot take it."""
        worker = cluster.get(event.pinned_decode_worker_id or "")
        if worker is None or worker.role is not Role.DECODE:
            return None
        ask = Ask(
            held_tokens=held_tokens,
            shared_tokens=event.prompt_tokens,
            excluded_worker_ids=event.excluded_worker_ids,
        )
        match self._decode.run(ask, (worker,), now_s, self._rng, self._probe):
            case Picked(worker=pinned):
                return _chosen(None, pinned, ask, Reason.PINNED)
            case Emptied():
                return None

    def _place_prefill_only(self, event: PlanRequested, cluster: ClusterState, now_s: float) -> Chosen | NotPlaced:
        ask = _prefill_ask(event)
        verdict = self._prefill.run(ask, cluster.with_role(Role.PREFILL), now_s, self._rng, self._probe)
        if isinstance(verdict, Picked):
            return Chosen(prefill=verdict.worker, decode=None, decode_blocks=0, reason=Reason.PREFILL_ONLY)
        if (busy := _prefill_busy(verdict)) is not None:
            return busy
        # Nobody hands anything over, so any engine can compute the prompt and its one token.
        fallback = self._decode.run(ask, cluster.with_role(Role.DECODE), now_s, self._rng, self._probe)
        if isinstance(fallback, Picked):
            return _chosen(None, fallback.worker, ask, Reason.NO_PREFILL_WORKER)
        return _decode_refusal(ask, fallback, cluster)


def _prefill_ask(event: PlanRequested) -> Ask:
    """A prefill worker holds the prompt; its one output token needs no KV there."""
    return Ask(
        held_tokens=event.prompt_tokens,
        computed_tokens=event.prompt_tokens,
        excluded_worker_ids=event.excluded_worker_ids,
    )


def _chosen(prefill: Worker | None, decode: Worker, ask: Ask, reason: Reason) -> Chosen:
    return Chosen(prefill=prefill, decode=decode, decode_blocks=ask.blocks(decode.block_size_tokens), reason=reason)


def _prefill_busy(emptied: Emptied) -> NotPlaced | None:
    """There are prefill workers, and they are full; None when there are none."""
    match emptied.by:
        case "request_slots":
            return NotPlaced(cause="prefill_slots", message="Every prefill worker runs as many requests as it admits.")
        case "prefill_backlog":
            return NotPlaced(cause="prefill_backlog", message="Every prefill worker has enough prompts to compute.")
        case _:
            return None


def _decode_refusal(ask: Ask, emptied: Emptied, cluster: ClusterState) -> NotPlaced:
    """Name the worst thing that is true: it can never fit, nobody is there, or it does not fit now."""
    registered = cluster.with_role(Role.DECODE)
    if registered and not any(could_hold(ask, worker) for worker in registered):
        largest = max(worker.blocks_total * worker.block_size_tokens for worker in registered)
        message = f"The request needs room for {ask.held_tokens} tokens; the largest decode worker has {largest}."
        return NotPlaced(cause="too_large", message=message)
    match emptied.by:
        case "kv_headroom":
            missing = min(ask.blocks(worker.block_size_tokens) - worker.free_blocks for worker in emptied.dropped)
            assert missing > 0
            message = f"No decode worker has room now; {missing} KV blocks are missing."
            return NotPlaced(cause="no_headroom", message=message, missing_blocks=missing)
        case "request_slots":
            message = "Every decode worker with room runs as many requests as it admits."
            return NotPlaced(cause="decode_slots", message=message)
        case _:
            return NotPlaced(cause="no_worker", message="No decode worker is ready for this request.")
