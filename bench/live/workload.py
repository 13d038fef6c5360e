"""The load of a fidelity run: arrivals for the simulator, and prompts of the same lengths for a real cluster."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from bench.live.client import Prompt
from simulation.replay.traces import Arrival, Trace

TOKEN_FIRST, TOKEN_LAST = 3, 500
"""Ids that prompts are drawn from: every model here has them, and the fake engine too."""


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Means of gamma distributions with shape 2, which are cut at the bounds."""

    prompt_tokens: float
    output_tokens: float
    prompt_tokens_min: int = 64
    prompt_tokens_max: int = 1024
    output_tokens_max: int = 128

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Of one request: prompt tokens, output tokens."""
        prompt = round(rng.gammavariate(2.0, self.prompt_tokens / 2.0))
        output = round(rng.gammavariate(2.0, self.output_tokens / 2.0))
        return (
            min(self.prompt_tokens_max, max(self.prompt_tokens_min, prompt)),
            min(self.output_tokens_max, max(2, output)),
        )


def made(lengths: Lengths, requests: int, per_s: float, seed: int, block_size_tokens: int) -> Trace:
    """Poisson arrivals of prompts that share nothing."""
    rng = random.Random(f"{seed} fidelity")
    arrivals, at_s = [], 0.0
    for _ in range(requests):
        prompt, output = lengths.draw(rng)
        arrivals.append(Arrival(arrived_s=at_s, prompt_tokens=prompt, output_tokens=output))
        at_s += rng.expovariate(per_s)
    return Trace(key_tokens=block_size_tokens, arrivals=arrivals)


def prompts_of(trace: Trace, seed: int, tenant: str = "") -> list[Prompt]:
    """Prompts of random tokens, so that none begins as another does."""
    rng = random.Random(f"{seed} tokens")
    return [
        Prompt(
            due_s=each.arrived_s,
            token_ids=random_tokens(each.prompt_tokens, rng),
            output_tokens=each.output_tokens,
            tenant=tenant,
        )
        for each in trace.arrivals
    ]


def random_tokens(count: int, rng: random.Random) -> Sequence[int]:
    """So many token ids."""
    return rng.choices(range(TOKEN_FIRST, TOKEN_LAST + 1), k=count)
