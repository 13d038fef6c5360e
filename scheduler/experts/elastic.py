"""Placements for more or fewer ranks with the fewest moves. Plans only: vLLM 0.32 changes no running group. Pure."""

from __future__ import annotations

import dataclasses

import numpy as np

from engine.expert_map import Array, ExpertMap, per_expert
from scheduler.experts.solver import BadSizes, received, resplit
from scheduler.experts.split import split


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A placement on another number of ranks."""

    placed: ExpertMap
    moves: Array
    """[layers, ranks]: experts that each rank receives."""
    fewest: float
    """Moves a layer, on average, below which no placement on these ranks is possible."""
    without_donor: int
    """Experts, over all layers, that no remaining rank holds: another pool or the disk gives them."""


def join(counts: Array, slots: Array, ranks: int) -> Scaled:
    """Fill ``ranks - len`` new ranks with copies of the experts that weigh most; nothing else moves.

    ``slots``: [layers, old ranks, slots of a rank]. Every new slot receives one expert, which is also the fewest.
    """
    layers, old, width = slots.shape
    if ranks <= old or width > counts.shape[1]:
        raise BadSizes(f"ranks: {ranks} are no more than the {old} there are")
    grown = np.concatenate([slots, np.full((layers, ranks - old, width), -1)], axis=1)
    copies = per_expert(slots, np.ones(slots.shape), counts.shape[1])
    held = np.zeros((layers, ranks, counts.shape[1]), dtype=bool)
    rows = np.arange(layers)
    for slot in range(width):
        for rank in range(old, ranks):
            weight = np.where(held[:, rank], -1.0, counts / copies)
            chosen = weight.argmax(axis=1)
            grown[:, rank, slot] = chosen
            held[rows, rank, chosen] = True
            copies[rows, chosen] += 1
    placed = resplit(counts, grown)
    return Scaled(placed, received(slots, grown), float((ranks - old) * width), 0)


def leave(counts: Array, slots: Array, lost: frozenset[int]) -> Scaled:
    """Give each expert whose last copy was on a ``lost`` rank the slot of a spare copy, where that weighs least.

    The remaining ranks keep their order and close the gaps. One receive for each such expert is also the fewest.
    """
    layers, ranks, width = slots.shape
    kept = [rank for rank in range(ranks) if rank not in lost]
    experts = counts.shape[1]
    if not lost <= set(range(ranks)) or len(kept) * width < experts:
        raise BadSizes(f"ranks: {len(kept)} with {width} slots hold no {experts} experts")
    before = slots[:, kept]
    left = before.copy()
    rows = np.arange(layers)
    missing = per_expert(left, np.ones(left.shape), experts) == 0
    todo = np.argsort(np.where(missing, -counts, np.inf), axis=1, kind="stable")
    for at in range(int(missing.sum(axis=1).max())):
        active = rows[missing.sum(axis=1) > at]
        expert = todo[active, at]
        weight = counts[active, expert][:, None]
        copies = per_expert(left[active], np.ones(left[active].shape), experts)
        parts = split(np.where(copies > 0, counts[active], 0.0), left[active])
        flat = left[active].reshape(len(active), -1)
        spare = np.take_along_axis(copies, flat, 1) - 1
        there, part = np.repeat(parts.sum(-1), width, axis=1), parts.reshape(len(active), -1)
        after = np.maximum(there - part + weight, there + part / np.maximum(spare, 1))
        chosen = np.where(spare < 1, np.inf, after).argmin(axis=1)
        left[active, chosen // width, chosen % width] = expert
    moves = received(before, left)
    gone = int(missing.sum())
    return Scaled(resplit(counts, left), moves, gone / layers, gone)
