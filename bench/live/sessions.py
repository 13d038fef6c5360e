"""Prompts of sessions: each begins with a text that several share, and grows by a turn at a time."""

from __future__ import annotations

import random

import msgspec

from bench.live.client import Prompt
from bench.live.workload import random_tokens


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """Of one segment of the load. Tokens of each part; ``turn_gap_s``: mean time between turns of a session."""

    requests: int
    per_s: float
    shared_prompts: int = 6
    shared_tokens: int = 384
    first_tokens: int = 64
    turn_tokens: int = 96
    turns: int = 4
    turn_gap_s: float = 4.0
    output_tokens: int = 12

    def prompts(self, seed: int, tenant: str) -> list[Prompt]:
        """In the order of their arrival, from 0 s on. Each tenant has texts of its own; the shape is the seed's."""
        shape, texts = random.Random(f"{seed} shape"), random.Random(f"{seed} {tenant}")
        shared = [random_tokens(self.shared_tokens, texts) for _ in range(self.shared_prompts)]
        made: list[Prompt] = []
        began_s = 0.0
        while len(made) < self.requests:
            began_s += shape.expovariate(self.per_s / self.turns)
            made.extend(self._session(began_s, list(shape.choice(shared)), shape, texts, tenant))
        made.sort(key=lambda each: each.due_s)
        first_s = made[0].due_s
        return [msgspec.structs.replace(each, due_s=each.due_s - first_s) for each in made[: self.requests]]

    def _session(
        self, began_s: float, known: list[int], shape: random.Random, texts: random.Random, tenant: str
    ) -> list[Prompt]:
        turns, at_s = [], began_s
        for turn in range(self.turns):
            known += random_tokens(self.turn_tokens if turn else self.first_tokens, texts)
            turns.append(Prompt(due_s=at_s, token_ids=tuple(known), output_tokens=self.output_tokens, tenant=tenant))
            at_s += 1.0 + shape.expovariate(1.0 / (self.turn_gap_s - 1.0))
        return turns
