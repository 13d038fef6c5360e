"""The ratio law: how many requests a second each pool can serve within the SLO, without a simulation. Pure.

A pool's capacity is its workers times what one of them computes: prompts by their uncached tokens, outputs by the
largest batch whose steps keep the time between tokens and whose KV fits. The best split serves as many prompts as
outputs. The law knows means only, so it says where to look; replays decide.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict

import msgspec

from simulation.replay.cluster_model import ClusterModel
from simulation.replay.traces import Trace
from simulation.sizing.objective import Objective

FILLS_MIN = 5.0
"""Arrivals have to come for so many times as long as a request lasts. In less time a cluster that is too small does not
fill up, and it looks as if it could serve any rate."""
_HALVINGS = 40
_SHARES = 20


class Split(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Workers of each role. Without prefill workers each worker does both: they stay together."""

    prefill: int
    decode: int

    @property
    def workers(self) -> int:
        """Of both roles."""
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D" if self.prefill else f"{self.decode} together"


def all_splits(workers: int) -> list[Split]:
    """From all together to all but one for prompts."""
    return [Split(prefill=prefill, decode=workers - prefill) for prefill in range(workers)]


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the requests of a trace; times are of an idle worker of one cluster model."""

    prompt_tokens: float
    uncached_tokens: float
    output_tokens: float
    # Of a sequence that decodes, weighted by how long it does.
    context_tokens: float
    prompt_s: float
    prompt_squared_s2: float
    # What the TTFT bound leaves beside the prompt's own time.
    slack_s: float


def demand(trace: Trace, model: ClusterModel, objective: Objective, caches: int) -> Demand:
    """What a trace asks for, if ``caches`` workers keep prefixes as one cache that evicts the least recently used."""
    room = max(1, caches * model.kv_blocks_total * model.block_size_tokens // trace.key_tokens)
    # Unlike a dict, it finds its oldest key at once after many were removed.
    cache: OrderedDict[int, None] = OrderedDict()
    uncached, times, slacks = 0, [], []
    for each in trace.arrivals:
        hits = 0
        for key in each.block_keys:
            if key not in cache:
                break
            hits += 1
        for key in each.block_keys:
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > room:
            cache.popitem(last=False)
        cached = min(hits * trace.key_tokens, each.prompt_tokens - 1)
        new = each.prompt_tokens - cached
        uncached += new
        times.append(model.prompts.prompt_s(new, cached, model.batched_tokens_max))
        slacks.append(max(0.0, objective.slo.ttft_of(each.prompt_tokens, model) - times[-1]))
    count, arrivals = len(trace.arrivals), trace.arrivals
    outputs = sum(each.output_tokens for each in arrivals)
    contexts = sum(each.output_tokens * (each.prompt_tokens + each.output_tokens / 2) for each in arrivals)
    return Demand(
        prompt_tokens=sum(each.prompt_tokens for each in arrivals) / count,
        uncached_tokens=uncached / count,
        output_tokens=outputs / count,
        context_tokens=contexts / outputs,
        prompt_s=statistics.fmean(times),
        prompt_squared_s2=statistics.fmean(each * each for each in times),
        slack_s=statistics.fmean(slacks),
    )


def filling(asked: Demand, objective: Objective, rate_rps: float) -> int:
    """So many requests fill the cluster up, if their tokens come as slowly as they may, the first ones too."""
    lasts_s = asked.slack_s + asked.prompt_s + asked.output_tokens * objective.slo.itl_s
    return math.ceil(FILLS_MIN * rate_rps * lasts_s)


def capacity_rps(split: Split, asked: Demand, model: ClusterModel, objective: Objective) -> float:
    """Requests a second that a split serves within the SLO, if decode workers compute the best share of the prompts.

    That is what the router does: it sends prompts to decode workers where that is faster.
    """
    if not split.prefill:
        return split.decode * _decode_rps(asked, model, objective, share=1.0)
    late = 1.0 - objective.targets.get("ttft", objective.strictest)
    links = min(split.prefill, split.decode) / model.link.occupied_s(asked.prompt_tokens * model.kv_bytes_per_token)
    apart = min(_prefill_rps(split.prefill, asked, late), links)
    shares = [step / _SHARES for step in range(_SHARES)]
    return max(
        min(apart / (1.0 - share), split.decode * _decode_rps(asked, model, objective, share=share)) for share in shares
    )


def _prefill_rps(workers: int, asked: Demand, late: float) -> float:
    """The highest rate at which at most ``late`` of the prompts wait longer than they may: M/G/c.

    Whether a prompt waits at all: Sakasegawa's approximation. How long then: exponential, of Pollaczek and Khinchine's
    mean.
    """
    power = math.sqrt(2 * (workers + 1)) - 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        busy = (low + high) / 2
        wait_s = asked.prompt_squared_s2 / (2 * asked.prompt_s) / (workers * (1.0 - busy))
        if busy**power * math.exp(-asked.slack_s / wait_s) <= late:
            low = busy
        else:
            high = busy
    return workers * low / asked.prompt_s


def _decode_rps(asked: Demand, model: ClusterModel, objective: Objective, *, share: float) -> float:
    """Of one worker that computes a share of the prompts: the largest batch whose KV fits and whose mean step is short.

    The batch may be a part.
    """

    def step_s(batch: int) -> float:
        step = model.step.fixed_s + model.step.decode_s(batch, round(batch * asked.context_tokens))
        # Each sequence brings its share of a prompt in the steps of its output, beside the steps' own fixed time.
        return step + share * batch * asked.prompt_s / asked.output_tokens

    fits = int(model.kv_blocks_total * model.block_size_tokens / asked.context_tokens)
    low, high = 0, max(1, min(model.sequences_max, fits)) + 1
    while high - low > 1:
        batch = (low + high) // 2
        low, high = (batch, high) if step_s(batch) <= objective.slo.itl_s else (low, batch)
    return low / step_s(low) / asked.output_tokens if low else 0.0
