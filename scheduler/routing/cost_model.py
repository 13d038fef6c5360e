"""What a pair of workers would cost a request, in predicted seconds, and which pair costs least. Changes nothing.

The cost is the time to the second token, and the time by which the request's prompt stalls those that decode beside it:

- prefill and decode worker: wait + load + computation, then hand-off + one step;
- decode worker alone: wait + load + computation beside the decode steps there, then one step; and the computation
  again, for the others.

The load is that of leading tokens which the worker has in a KV tier, where that and computing the rest takes less time.

A pair is not eligible where the TTFT or the time between tokens that the client asks for is predicted to be missed, or
where a decode worker that computes a prompt would slow its requests too much.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal

import msgspec

from scheduler.cluster.decode_pace import OutputLengths, pace_s
from scheduler.cluster.worker import Worker

PAIRED_MAX = 4
"""The best workers of each side whose pairs are compared, where a topology makes some pairs dearer than others."""
ALONE_MAX = 8
"""The best decode workers that are considered alone."""
ITL_SHARE = 0.9
"""Of the time between tokens that a client asks for, what may be planned: predictions err."""
FARTHER = 2.0
"""For each level of the topology at which two workers are apart, a hand-off is taken to last this much longer."""
SLOWDOWN_MAX = 2.0
"""Where no client asks for a time between tokens, prompts may at most double that of a decode worker."""

Missed = Literal["ttft_slo", "itl_slo", "decode_busy"]


class Need(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the predictions need to know of a request. ``held``: leading tokens that workers hold, by worker.

    At least the last token is held by none: it is computed in any case.
    """

    prompt_tokens: int
    held: Mapping[str, int] = {}
    # Those workers, the ones that hold most first; with what tiers have, where any has something.
    leaders: Sequence[Sequence[str]] = ()
    # What workers have in KV tiers beyond that: tokens from the prompt's start, by medium, the fastest first.
    stored: Mapping[str, Sequence[tuple[int, int]]] = {}
    # What is left of it. 0: nothing is asked for.
    ttft_slo_s: float = 0.0
    itl_slo_s: float = 0.0
    # How long the prompt takes by the law of the pool, by how much of it is held.
    lawful_s: dict[int, float] = msgspec.field(default_factory=dict)

    def compute_s(self, worker: Worker, held_tokens: int) -> float:
        """How long this worker alone would take for the prompt."""
        lawful_s = self.lawful_s.get(held_tokens)
        if lawful_s is None:
            lawful_s = worker.latency.learnt.prompt_s(self.prompt_tokens - held_tokens, held_tokens)
            self.lawful_s[held_tokens] = lawful_s
        return worker.latency.factor * lawful_s

    def prompt(self, worker: Worker) -> tuple[int, float, float]:
        """Tokens that the worker need not compute, what loading them takes, and what computing the rest takes."""
        held = self.held.get(worker.target, 0)
        best = held, 0.0, self.compute_s(worker, held)
        if not self.stored:
            return best
        for medium, tokens in self.stored.get(worker.target, ()):
            load_s, compute_s = worker.load_s(medium, tokens - held), self.compute_s(worker, tokens)
            if load_s + compute_s < best[1] + best[2]:
                best = tokens, load_s, compute_s
        return best


class Compute(msgspec.Struct, frozen=True, gc=False):
    """A worker that may compute the prompt."""

    ttft_s: float
    worker: Worker
    held_tokens: int
    wait_s: float
    compute_s: float
    load_s: float = 0.0


class Continue(msgspec.Struct, frozen=True, gc=False):
    """A worker that may compute the output. ``share``: of its time, what prompts take."""

    cost_s: float
    worker: Worker
    held_tokens: int
    transfer_s: float
    step_s: float
    window_s: float
    share: float


class Pair(msgspec.Struct, frozen=True, gc=False):
    """Which worker computes the prompt, and which the output: one worker may do both. ``missed``: why it may not."""

    cost_s: float
    compute: Compute
    onward: Continue | None
    missed: Missed | None = None


_TTFT = operator.attrgetter("ttft_s")
_COST = operator.itemgetter(0)


def computing(need: Need, workers: Sequence[Worker], now_s: float) -> list[Compute]:
    """All of these workers, soonest first token first."""
    found = []
    for worker in workers:
        held, load_s, compute_s = need.prompt(worker)
        wait_s = worker.prompt_wait_s(now_s)
        found.append(Compute(wait_s + load_s + compute_s, worker, held, wait_s, compute_s, load_s))
    found.sort(key=_TTFT)
    return found


def continuing(need: Need, workers: Sequence[Worker], lengths: OutputLengths, now_s: float) -> list[Continue]:
    """The best ALONE_MAX of these workers, least cost first."""
    costs = []
    tokens, held_tokens, law = need.prompt_tokens, need.held.get, workers[0].latency.learnt.decode_steps.law
    for worker in workers:
        held = held_tokens(worker.target, 0)
        step_s = worker.latency.factor * law.decode_step_s(worker.request_count + 1, worker.context_tokens + tokens)
        transfer_s = worker.transfer_s(tokens - held)
        costs.append((transfer_s + step_s, worker, held, transfer_s, step_s))
    costs.sort(key=_COST)
    found = []
    for cost_s, worker, held, transfer_s, step_s in costs[:ALONE_MAX]:
        window_s = lengths.window_s(step_s)
        share = worker.prompt_share.at(window_s, now_s)
        found.append(Continue(cost_s, worker, held, transfer_s, step_s, window_s, share))
    return found


def alone(need: Need, onwards: Sequence[Continue], now_s: float, cost_max_s: float = inf) -> list[Pair]:
    """Decode workers that compute the prompt too; those that cost more than ``cost_max_s`` are left out."""
    found = []
    for onward in onwards:
        worker, step_s = onward.worker, onward.step_s
        if need.stored:
            held, load_s, compute_s = need.prompt(worker)
        else:
            held, load_s, compute_s = onward.held_tokens, 0.0, need.compute_s(worker, onward.held_tokens)
        if 2.0 * (step_s + compute_s) > cost_max_s:
            continue
        wait_s = worker.prompt_wait_s(now_s)
        ttft_s = wait_s + load_s + compute_s + step_s * (1 + len(worker.prompts))
        cost_s = ttft_s + step_s + compute_s
        if cost_s > cost_max_s:
            continue
        missed: Missed | None = None
        if pace_s(step_s, onward.share + compute_s / onward.window_s) > _pace_max_s(need, onward):
            missed = "decode_busy"
        elif 0.0 < need.ttft_slo_s < ttft_s:
            missed = "ttft_slo"
        found.append(Pair(cost_s, Compute(ttft_s, worker, held, wait_s, compute_s, load_s), onward, missed))
    return found


def only(need: Need, compute: Compute) -> Pair:
    """A worker that computes the prompt and one token."""
    late = 0.0 < need.ttft_slo_s < compute.ttft_s
    return Pair(compute.ttft_s, compute, None, "ttft_slo" if late else None)


def pairs(need: Need, computes: Sequence[Compute], onwards: Sequence[Continue]) -> list[Pair]:
    """Prefill workers, each with decode workers that take over; the cheapest eligible pair is among them.

    Both are sorted by what they cost. That adds up: without a topology the best of each side are the best pair.
    """
    onwards = onwards[:PAIRED_MAX]
    if computes[0].worker.placed or onwards[0].worker.placed:
        return [pair(need, compute, onward) for compute in computes for onward in onwards]
    found = [pair(need, computes[0], onward) for onward in onwards]
    best = next((each.onward for each in found if each.missed is None), None)
    return found if best is None else [*found, *[pair(need, compute, best) for compute in computes[1:]]]


def pair(need: Need, compute: Compute, onward: Continue) -> Pair:
    """A prefill worker, and a decode worker that takes over."""
    levels = compute.worker.levels_from(onward.worker)
    if levels:
        farther_s = onward.transfer_s * (FARTHER**levels - 1.0)
        onward = msgspec.structs.replace(
            onward, cost_s=onward.cost_s + farther_s, transfer_s=onward.transfer_s + farther_s
        )
    missed: Missed | None = None
    if 0.0 < need.ttft_slo_s < compute.ttft_s:
        missed = "ttft_slo"
    elif 0.0 < need.itl_slo_s * ITL_SHARE < pace_s(onward.step_s, onward.share):
        missed = "itl_slo"
    return Pair(compute.ttft_s + onward.cost_s, compute, onward, missed)


def _pace_max_s(need: Need, onward: Continue) -> float:
    """How slow the requests of a decode worker may become."""
    asked_s = min(onward.worker.itl_slo_s, need.itl_slo_s or inf)
    return asked_s * ITL_SHARE if asked_s < inf else onward.step_s * SLOWDOWN_MAX
