"""Made traffic: sessions that begin at random, whose prompts grow by what was said before.

The lengths are plausible and nothing more; what was recorded is better where there is any.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping

import msgspec

from simulation.replay.traces import MADE_KEY_TOKENS, Arrival, Trace

TOKEN_S = 0.02
"""A session's next turn comes after the last answer, which is taken to be given at this pace."""
BEFORE_SESSIONS = 4
"""So many mean lengths of a session before the first request sessions begin: the first half has as late turns as the
second."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Means of gamma distributions with shape 2; ``shared_*`` are exact. ``turns`` of a session: at least 1."""

    first_tokens: float
    output_tokens: float
    turns: float = 1.0
    turn_tokens: float = 0.0
    think_s: float = 0.0
    # Beginnings that sessions share, and the tokens of each.
    shared_prompts: int = 0
    shared_tokens: int = 0


SHAPES: Mapping[str, Shape] = {
    "multi-turn": Shape(first_tokens=800, output_tokens=300, turns=6, turn_tokens=200, think_s=20),
    "shared-prompt": Shape(first_tokens=400, output_tokens=200, shared_prompts=8, shared_tokens=4096),
    "agents": Shape(
        first_tokens=1000,
        output_tokens=120,
        turns=15,
        turn_tokens=1500,
        think_s=3,
        shared_prompts=4,
        shared_tokens=6144,
    ),
    "reasoning": Shape(first_tokens=500, output_tokens=6000, turns=2, turn_tokens=200, think_s=60),
    "summarisation": Shape(first_tokens=12_000, output_tokens=250),
}


def made(kind: str, requests: int, per_s: float, seed: int) -> Trace:
    """So many requests, about ``per_s`` a second, of one of SHAPES."""
    shape, rng = SHAPES[kind], random.Random(f"{seed} {kind}")
    keys = itertools.count(1)
    shared = [[next(keys) for _ in range(shape.shared_tokens // MADE_KEY_TOKENS)] for _ in range(shape.shared_prompts)]
    arrivals: list[Arrival] = []
    began_s = -BEFORE_SESSIONS * (shape.turns - 1.0) * (shape.output_tokens * TOKEN_S + shape.think_s)
    while began_s < requests / per_s or len(arrivals) < requests:
        began_s += rng.expovariate(per_s / shape.turns)
        known = list(rng.choice(shared)) if shared else []
        arrivals.extend(each for each in _session(shape, began_s, known, keys, rng) if each.arrived_s >= 0.0)
    arrivals.sort(key=lambda each: each.arrived_s)
    return Trace(key_tokens=MADE_KEY_TOKENS, arrivals=arrivals[:requests])


def _session(
    shape: Shape, began_s: float, known: list[int], keys: Iterator[int], rng: random.Random
) -> Iterator[Arrival]:
    """Turn by turn. ``known``: the keys of the prompt so far, which grows."""
    at_s, tokens = began_s, shape.shared_tokens + _draw(shape.first_tokens, rng)
    while True:
        known.extend(itertools.islice(keys, tokens // MADE_KEY_TOKENS - len(known)))
        output = _draw(shape.output_tokens, rng)
        yield Arrival(arrived_s=at_s, prompt_tokens=tokens, output_tokens=output, block_keys=tuple(known))
        if rng.random() >= 1 - 1 / shape.turns:
            return
        at_s += output * TOKEN_S + rng.expovariate(1 / shape.think_s)
        tokens += output + _draw(shape.turn_tokens, rng)


def _draw(mean: float, rng: random.Random) -> int:
    return max(1, round(rng.gammavariate(2.0, mean / 2.0)))
