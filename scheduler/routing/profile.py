"""Filter, score, pick: how one worker is chosen among many. Holds the frame; the policies are in ``policies/``.

Policies read ``Worker`` and ``Ask`` and change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from scheduler.cluster.state import Worker


class Ask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one request asks of one worker."""

    # Tokens whose KV must have room until the request ends.
    held_tokens: int
    # Leading tokens whose full blocks already lie on the worker, shared with a sibling.
    shared_tokens: int = 0
    # Prompt tokens the worker would compute.
    computed_tokens: int = 0
    excluded_worker_ids: frozenset[str] = frozenset()

    def blocks(self, block_size_tokens: int) -> int:
        """Blocks of this size that the request would add."""
        return max(1, -(-self.held_tokens // block_size_tokens) - self.shared_tokens // block_size_tokens)


class Random(Protocol):
    """The part of ``random.Random`` that a picker needs."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...


class Probe(Protocol):
    """Times policies from outside, since no policy may read a clock."""

    def start(self) -> None:
        """A profile starts to run."""
        ...

    def lap(self, policy: str) -> None:
        """A policy ended."""
        ...


class Policy(Protocol):
    """What every policy says about itself."""

    @property
    def name(self) -> str:
        """Unique, short; a metric label."""
        ...


class Filter(Policy, Protocol):
    """Drops workers that cannot or should not serve."""

    def keep(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """The workers that pass, in the given order."""
        ...


class Scorer(Policy, Protocol):
    """Rates workers."""

    def score(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[float]:
        """One score in [0, 1] for each worker; higher is better."""
        ...


class Picker(Policy, Protocol):
    """Takes one worker."""

    def pick(self, workers: Sequence[Worker], scores: Sequence[float], rng: Random | None) -> int:
        """Index of the chosen worker. Without ``rng`` chance is replaced by the least worker id."""
        ...


class Picked(msgspec.Struct, frozen=True, gc=False):
    """A worker was chosen; ``score`` is the weighted mean of its scores."""

    worker: Worker
    score: float


class Survivors(msgspec.Struct, frozen=True, gc=False):
    """Workers that passed every filter; at least one."""

    workers: Sequence[Worker]


class Emptied(msgspec.Struct, frozen=True, gc=False):
    """No worker is left. ``by`` names the filter that dropped the last of them; empty when there was none at all."""

    by: str
    dropped: Sequence[Worker] = ()


class Profile:
    """The policies by which one role's worker is chosen."""

    def __init__(self, filters: Sequence[Filter], scorers: Sequence[tuple[Scorer, float]], picker: Picker) -> None:
        self._filters = tuple(filters)
        self._scorers = tuple((scorer, weight) for scorer, weight in scorers if weight > 0)
        self._picker = picker
        self._weights_sum = sum(weight for _, weight in self._scorers) or 1.0

    def run(
        self, ask: Ask, workers: Sequence[Worker], now_s: float, rng: Random | None = None, probe: Probe | None = None
    ) -> Picked | Emptied:
        """Filter, score and pick in one go."""
        match self.survivors(ask, workers, now_s, probe):
            case Survivors(workers=left):
                return self.best(ask, left, now_s, rng, probe)
            case emptied:
                return emptied

    def survivors(
        self, ask: Ask, workers: Sequence[Worker], now_s: float, probe: Probe | None = None
    ) -> Survivors | Emptied:
        """The workers that pass every filter."""
        if not workers:
            return Emptied("")
        if probe is not None:
            probe.start()
        for policy in self._filters:
            left = policy.keep(ask, workers, now_s)
            if probe is not None:
                probe.lap(policy.name)
            if not left:
                return Emptied(policy.name, workers)
            workers = left
        return Survivors(workers)

    def best(
        self, ask: Ask, workers: Sequence[Worker], now_s: float, rng: Random | None = None, probe: Probe | None = None
    ) -> Picked:
        """The best of workers that passed the filters."""
        assert workers
        if probe is not None:
            probe.start()
        totals = [0.0] * len(workers)
        for scorer, weight in self._scorers:
            share = weight / self._weights_sum
            scores = scorer.score(ask, workers, now_s)
            assert len(scores) == len(workers), scorer.name
            assert min(scores) >= 0.0, scorer.name
            assert max(scores) <= 1.0, scorer.name
            totals = [total + share * score for total, score in zip(totals, scores, strict=True)]
            if probe is not None:
                probe.lap(scorer.name)
        index = self._picker.pick(workers, totals, rng)
        if probe is not None:
            probe.lap(self._picker.name)
        return Picked(workers[index], totals[index])
