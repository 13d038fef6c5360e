"""Chooses one request's workers, prefill and decode together. Reads a pool; reserves and stores nothing."""

from __future__ import annotations

import enum
import itertools
import operator
from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal

import msgspec

from runtime.roles import WorkerRole
from scheduler.api.chance import Random
from scheduler.api.events import PlanRequested
from scheduler.api.explanation import OPTIONS_MAX, Option
from scheduler.cluster.decode_pace import OutputLengths, pace_s
from scheduler.cluster.model_pool import ModelPool
from scheduler.cluster.worker import Worker
from scheduler.config import SchedulerParameters
from scheduler.routing.cost_model import (
    PAIRED_MAX,
    Compute,
    Need,
    Pair,
    alone,
    computing,
    continuing,
    only,
    pairs,
)
from scheduler.routing.filters import Ask, Emptied, kv_capacity, passing, strictly
from scheduler.routing.prefixes import Prefixes

Cause = Literal[
    "plans_in_flight",
    "plan_id_in_use",
    "no_worker",
    "too_large",
    "no_headroom",
    "decode_slots",
    "prefill_slots",
    "prefill_backlog",
    "ttft_slo",
    "itl_slo",
    "wait_too_long",
    "queue_full",
    "waited_out",
]

COMPARED_MAX = 8
"""Workers of one role that are compared for a request: among so many one is as good as the best of all. With 16 the
goodput of 16 prefill and 16 decode workers is no better (Mooncake's conversation trace)."""
LEADERS_MAX = 4
"""Of them, those that are there since they hold most of the prompt."""
_COST = operator.attrgetter("cost_s")
_VERDICTS = {
    "ttft_slo": "would miss the TTFT asked for",
    "itl_slo": "would miss the time between tokens asked for",
    "decode_busy": "would slow down the requests that decode there",
}


class Reason(enum.StrEnum):
    """Why a plan has the shape it has. Travels in ``Plan.reason`` and labels a metric."""

    REMOTE = "remote"
    DECODE_SOONER = "decode_sooner"
    NO_PREFILL_WORKER = "no_prefill_worker"
    PINNED = "pinned"
    PREFILL_ONLY = "prefill_only"


class Placed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where a request runs. ``decode_blocks`` is what to reserve; 0 without a decode worker."""

    prefill: Worker | None
    decode: Worker | None
    decode_blocks: int
    reason: Reason
    # How long the prompt's computation is predicted to take, and for how long it counts where requests decode.
    compute_s: float = 0.0
    window_s: float = 0.0
    options: tuple[Option, ...] = ()
    chosen: int | None = None


class NotPlaced(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request runs nowhere now."""

    cause: Cause
    message: str
    options: tuple[Option, ...] = ()


class Planner:
    """Filters the workers of each role, then takes the cheapest pair, or a decode worker alone."""

    def __init__(
        self, config: SchedulerParameters, rng: Random | None, prefixes: Prefixes, lengths: OutputLengths
    ) -> None:
        self._config = config
        self._rng = rng
        self._prefixes = prefixes
        self._lengths = lengths

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
        need = self._need(event, pool)
        decodes = self._compared("decode", ask, need, pool, now_s)
        if isinstance(decodes, Emptied):
            return _decode_refusal(ask, decodes, pool)
        computes = self._computing(event, need, pool, now_s)
        onwards = continuing(need, decodes, self._lengths, now_s)
        if computes is None:
            # With no prefill worker the decode workers' own requests have to bear it.
            return self._cheapest(_regardless(alone(need, onwards, now_s)), need, ask, Reason.NO_PREFILL_WORKER)
        # Only what was learnt may take a prompt away from the prefill workers.
        learnt = onwards if decodes[0].latency.observed else []
        if isinstance(computes, NotPlaced):
            found, busy = alone(need, learnt, now_s), computes
            if not need.ttft_slo_s:
                found = [each for each in found if each.compute.wait_s <= self._config.prefill_wait_max_s]
        else:
            found, busy = pairs(need, computes, onwards), None
            least_s = min([each.cost_s for each in found if each.missed is None], default=inf)
            found += alone(need, learnt, now_s, least_s)
        return self._cheapest(found, need, ask, Reason.REMOTE, busy)

    def _computing(
        self, event: PlanRequested, need: Need, pool: ModelPool, now_s: float
    ) -> list[Compute] | NotPlaced | None:
        """The prefill workers that come into question; NotPlaced if all are busy; None if there is none.

        A prompt whose client asks for no TTFT waits in the scheduler, where classes and tenants share, rather than at a
        worker where it is predicted to wait for long. It waits for no prediction before workers have shown their speed.
        """
        ask = _prefill_ask(event)
        prefills = self._compared("prefill", ask, need, pool, now_s)
        if isinstance(prefills, Emptied):
            return _SLOTS_BUSY if prefills.by == "request_slots" else None
        computes = computing(need, prefills, now_s)
        if need.ttft_slo_s or not prefills[0].latency.observed:
            return computes[:PAIRED_MAX]
        wait_max_s = self._config.prefill_wait_max_s
        short = [each for each in computes if each.wait_s <= wait_max_s]
        if not short and len(prefills) < len(pool.with_role("prefill")):
            every = passing("prefill", ask, pool.with_role("prefill"), now_s)
            assert not isinstance(every, Emptied)
            short = [each for each in computing(need, every, now_s) if each.wait_s <= wait_max_s]
        return short[:PAIRED_MAX] or _BACKLOG_BUSY

    def _need(self, event: PlanRequested, pool: ModelPool) -> Need:
        """What to predict by. Nothing is refused by a prediction before any worker has shown how fast it is."""
        workers = pool.with_role("decode") or pool.with_role("prefill")
        if not workers:
            return Need(prompt_tokens=event.prompt_tokens)
        worker = workers[0]
        known = worker.latency.observed
        asked = event.block_keys, worker.block_size_tokens, event.prompt_tokens
        groups, held = self._prefixes.held_tokens(*asked), dict[str, int]()
        for tokens, names in reversed(groups):
            if not held:
                # Mostly all hold the same few blocks, and few hold more.
                held = dict.fromkeys(names, tokens)
                continue
            for name in names:
                held[name] = tokens
        stored = self._prefixes.stored_tokens(*asked, held)
        return Need(
            prompt_tokens=event.prompt_tokens,
            held=held,
            leaders=_leaders(held, stored) if stored else [names for _, names in groups],
            stored=stored,
            ttft_slo_s=event.ttft_slo_s if known else 0.0,
            # A request that has begun goes on, however slowly: refused now, it would fail before its client's eyes.
            itl_slo_s=event.itl_slo_s if known and not event.resumed else 0.0,
        )

    def _compared(
        self, role: WorkerRole, ask: Ask, need: Need, pool: ModelPool, now_s: float
    ) -> Sequence[Worker] | Emptied:
        """The workers that are compared: of many the holders of most of the prompt, and a stretch of the others.

        In another order each time, so that equals share the work. Without ``rng`` the first ones win. Of many workers
        only so many are looked at as are needed.
        """
        workers = pool.with_role(role)
        first = int(self._rng.random() * len(workers)) if self._rng is not None else 0
        if len(workers) <= COMPARED_MAX:
            return passing(role, ask, [*workers[first:], *workers[:first]], now_s)
        end = first + COMPARED_MAX
        looked_at = _first_of(need.leaders, pool.named(role), first)
        looked_at += workers[first:end]
        looked_at += workers[: max(0, end - len(workers))]
        chosen = dict.fromkeys(strictly(role, ask, looked_at, now_s))
        if len(chosen) < COMPARED_MAX:
            left = passing(role, ask, [*workers[first:], *workers[:first]], now_s)
            if isinstance(left, Emptied):
                return left
            chosen |= dict.fromkeys(left)
        return list(itertools.islice(chosen, COMPARED_MAX))

    def _place_pinned(self, event: PlanRequested, held_tokens: int, pool: ModelPool, now_s: float) -> Placed | None:
        """Use the sibling's worker, which has the prompt's full blocks; None if it cannot take the request."""
        name = event.pinned_decode_worker_id
        pinned = [one for one in pool.with_role("decode") if name in (one.target, one.worker_id)]
        if len(pinned) > 1:
            # The KV lies on one of its ranks, and an older front proxy does not say which.
            held = self._need(event, pool).held
            pinned = [max(pinned, key=lambda rank: held.get(rank.target, 0))]
        ask = Ask(
            held_tokens=held_tokens,
            shared_tokens=event.prompt_tokens,
            excluded_worker_ids=event.excluded_worker_ids,
        )
        decodes = passing("decode", ask, pinned, now_s)
        if isinstance(decodes, Emptied):
            return None
        return Placed(
            prefill=None,
            decode=decodes[0],
            decode_blocks=ask.blocks(decodes[0].block_size_tokens),
            reason=Reason.PINNED,
        )

    def _place_prefill_only(self, event: PlanRequested, pool: ModelPool, now_s: float) -> Placed | NotPlaced:
        ask = _prefill_ask(event)
        need = self._need(event, pool)
        computes = self._computing(event, need, pool, now_s)
        if isinstance(computes, NotPlaced):
            return computes
        if computes is not None:
            return self._cheapest([only(need, compute) for compute in computes], need, ask, Reason.PREFILL_ONLY)
        # Nothing is handed over, so any engine can compute the prompt and its one token.
        decodes = self._compared("decode", ask, need, pool, now_s)
        if isinstance(decodes, Emptied):
            return _decode_refusal(ask, decodes, pool)
        onwards = continuing(need, decodes, self._lengths, now_s)
        return self._cheapest(_regardless(alone(need, onwards, now_s)), need, ask, Reason.NO_PREFILL_WORKER)

    def _cheapest(
        self, pairs: list[Pair], need: Need, ask: Ask, reason: Reason, busy: NotPlaced | None = None
    ) -> Placed | NotPlaced:
        """The pair that costs least of those that are eligible. ``busy``: what to say where there is none."""
        pairs.sort(key=_COST)
        best = next((each for each in pairs if each.missed is None), None)
        if best is None:
            return busy or _missed(need, pairs)
        kept = pairs[:OPTIONS_MAX]
        if best not in kept:
            kept[-1] = best
        prefill = best.compute.worker if best.compute.worker.role == "prefill" else None
        decode = best.onward.worker if best.onward is not None else None
        if prefill is None and reason is Reason.REMOTE:
            reason = Reason.DECODE_SOONER
        return Placed(
            prefill=prefill,
            decode=decode,
            decode_blocks=ask.blocks(decode.block_size_tokens) if decode is not None else 0,
            reason=reason,
            compute_s=best.compute.compute_s,
            window_s=best.onward.window_s if best.onward is not None else 0.0,
            options=tuple([_option(each) for each in kept]),
            chosen=kept.index(best),
        )


_SLOTS_BUSY = NotPlaced(cause="prefill_slots", message="Every prefill worker runs as many requests as it admits.")
_BACKLOG_BUSY = NotPlaced(cause="prefill_backlog", message="Every prefill worker has enough prompts to compute.")


def _first_of(leaders: Sequence[Sequence[str]], workers: Mapping[str, Worker], first: int) -> list[Worker]:
    """LEADERS_MAX of these workers. Of a group that is equal it begins with another one each time."""
    found: list[Worker] = []
    for names in leaders:
        start = first % len(names)
        for name in (*names[start:], *names[:start]) if start else names:
            if name in workers:
                found.append(workers[name])
                if len(found) == LEADERS_MAX:
                    return found
    return found


def _leaders(held: Mapping[str, int], stored: Mapping[str, Sequence[tuple[int, int]]]) -> list[list[str]]:
    """The workers that hold anything of a prompt, anywhere, by how much, most first."""
    groups: dict[int, list[str]] = {}
    for name, tokens in {**held, **{name: levels[-1][1] for name, levels in stored.items()}}.items():
        groups.setdefault(tokens, []).append(name)
    return [groups[tokens] for tokens in sorted(groups, reverse=True)]


def _regardless(pairs: Sequence[Pair]) -> list[Pair]:
    """The same, however much they slow down the requests that decode there."""
    return [msgspec.structs.replace(each, missed=None) if each.missed == "decode_busy" else each for each in pairs]


def _hides_tokens(pool: ModelPool) -> bool:
    """Whether a prefill shows no token, so that even a single one needs a decode worker. Workers of a pool agree."""
    return any(worker.info.prefill_backoff_tokens for worker in pool.with_role("prefill"))


def _option(each: Pair) -> Option:
    compute, onward = each.compute, each.onward
    handed = onward is not None and compute.worker is not onward.worker
    return Option(
        compute.worker.target if handed or onward is None else None,
        onward.worker.target if onward is not None else None,
        compute.held_tokens,
        onward.held_tokens if onward is not None else 0,
        compute.wait_s,
        compute.compute_s,
        onward.transfer_s if onward is not None and handed else 0.0,
        compute.ttft_s,
        pace_s(onward.step_s, onward.share) if onward is not None else 0.0,
        each.cost_s,
        _VERDICTS[each.missed] if each.missed is not None else "",
        compute.load_s,
    )


def _missed(need: Need, pairs: Sequence[Pair]) -> NotPlaced:
    """No pair gives the client what it asks for. The refusal names what comes nearest."""
    options = tuple([_option(each) for each in pairs[:OPTIONS_MAX]])
    late = [each.compute.ttft_s for each in pairs if each.missed == "ttft_slo"]
    if not late:
        message = "No decode worker is predicted to give tokens as often as the request asks for."
        return NotPlaced(cause="itl_slo", message=message, options=options)
    message = (
        f"The first token is predicted in {min(late):.2f} s; the request asks for it within {need.ttft_slo_s:.2f} s."
    )
    return NotPlaced(cause="ttft_slo", message=message, options=options)


def _prefill_ask(event: PlanRequested) -> Ask:
    """A prefill worker holds the prompt; its one output token needs no KV there."""
    return Ask(
        held_tokens=event.prompt_tokens,
        computed_tokens=event.prompt_tokens,
        excluded_worker_ids=event.excluded_worker_ids,
    )


def _decode_refusal(ask: Ask, emptied: Emptied, pool: ModelPool) -> NotPlaced:
    """Name the most lasting cause: it can never fit, no worker is ready, or it does not fit now."""
    registered = pool.with_role("decode")
    if registered and not kv_capacity(ask, registered, 0.0):
        context = max(worker.context_tokens_max for worker in registered)
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
