"""Tokens routed to each expert of one group: a long and a short window that forget by tokens, not by time. Pure."""

from __future__ import annotations

import numpy as np

from engine.expert_map import Array

# Where half of what is remembered is older: what a plan is made from, and what shows that traffic changed.
LONG_TOKENS = 1_000_000
SHORT_TOKENS = 128_000


class BadDelta(ValueError):
    """Counts of another shape, or negative ones; the message names what is wrong."""


class _Window:
    """A sum that halves with every ``half_life`` tokens."""

    def __init__(self, layers: int, experts: int, half_life: int) -> None:
        self.counts = np.zeros((layers, experts))
        self.tokens = 0.0
        self._half_life = half_life

    def add(self, tokens: int, counts: Array) -> None:
        kept = 0.5 ** (tokens / self._half_life)
        self.counts = self.counts * kept + counts
        self.tokens = self.tokens * kept + tokens


class Statistics:
    """What one group's ranks have routed. A pool's other groups, and the other pool, have their own."""

    def __init__(self, layers: int, experts: int) -> None:
        self.long = _Window(layers, experts, LONG_TOKENS)
        self.short = _Window(layers, experts, SHORT_TOKENS)
        self.lost_deltas = 0
        """Deltas that never came, by the gaps in their numbers."""
        self._next: dict[int, int] = {}

    def add(self, rank: int, sequence: int, tokens: int, counts: Array) -> bool:
        """Count a rank's delta; False: it came before. Its sequence numbers grow by one with each. Raises BadDelta."""
        if counts.shape != self.long.counts.shape:
            raise BadDelta(f"counts of rank {rank} have the shape {counts.shape}, not {self.long.counts.shape}")
        if tokens < 0 or (counts < 0).any():
            layer, expert = np.argwhere(counts < 0)[0] if (counts < 0).any() else ("-", "-")
            raise BadDelta(f"counts of rank {rank} are negative: layer {layer}, expert {expert}, {tokens} tokens")
        # Of a rank that spoke to an earlier scheduler the first ones are missing here.
        due = self._next.get(rank, sequence)
        if sequence < due:
            return False
        self.lost_deltas += sequence - due
        self._next[rank] = sequence + 1
        for window in (self.long, self.short):
            window.add(tokens, counts)
        return True

    @property
    def drift(self) -> float:
        """How far recent traffic is from the rest: total variation between both windows, mean of all layers, 0 to 1."""
        shares = [
            window.counts / np.maximum(window.counts.sum(axis=1, keepdims=True), 1e-12)
            for window in (self.long, self.short)
        ]
        return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)
