"""Which rank holds which experts: replicate the hot ones, pack, exchange, and split tokens among copies. Pure numpy.

``counts`` are tokens by [layer, logical expert]; ``slots`` are expert ids by [layer, rank, slot]. All layers are solved
side by side, so that one operation of numpy serves them all.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from engine.expert_map import Array, ExpertMap, balance
from scheduler.experts.moves import CLOSE_ENOUGH, incremental
from scheduler.experts.split import floored, split

_EXCHANGES_MAX = 600
# A gain below this part of the mean is not worth an exchange.
_GAIN_MIN = 2e-4
# Cross-node moves a layer that a hierarchical plan may make, after each node was solved on its own.
CROSS_NODE_MOVES = 16


class BadSizes(ValueError):
    """Counts, ranks and slots that no placement fits; the message names what is wrong."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The ranks that a placement is for. ``slots``: physical experts a layer over all ranks."""

    ranks: int
    slots: int
    nodes: int = 1
    # Expert groups of the model's router: a node holds whole groups in a hierarchical plan.
    groups: int = 1

    def check(self, counts: Array) -> None:
        """Raise BadSizes where ``counts`` cannot be placed on this."""
        if counts.ndim != 2 or 0 in counts.shape:
            raise BadSizes(f"counts have the shape {counts.shape}, not [layers, experts]")
        if not np.isfinite(counts).all() or (counts < 0).any():
            layer, expert = np.argwhere(~np.isfinite(counts) | (counts < 0))[0]
            raise BadSizes(f"layer {layer}: expert {expert} has the count {counts[layer, expert]}")
        experts = counts.shape[1]
        if self.ranks < 1 or self.slots % self.ranks:
            raise BadSizes(f"slots: {self.slots} do not divide among {self.ranks} ranks")
        if not experts <= self.slots <= experts * self.ranks:
            raise BadSizes(f"slots: {self.slots} for {experts} experts on {self.ranks} ranks, each at most once on one")
        if self.slots // self.ranks > experts:
            raise BadSizes(f"slots: {self.slots // self.ranks} a rank for {experts} experts")
        if self.nodes < 1 or self.ranks % self.nodes:
            raise BadSizes(f"nodes: {self.ranks} ranks do not divide among {self.nodes}")
        if self.groups < 1 or experts % self.groups:
            raise BadSizes(f"groups: {experts} experts do not divide among {self.groups}")

    @property
    def divides_by_node(self) -> bool:
        """Whether each node can hold whole groups."""
        return self.nodes > 1 and self.groups % self.nodes == 0


def fresh(counts: Array, shape: Shape, *, by_node: bool = False) -> ExpertMap:
    """A placement from nothing. ``by_node``: groups stay on a node but for a few experts, as prefill's traffic wants.

    Raises BadSizes.
    """
    shape.check(counts)
    weighed = floored(counts)
    if not by_node or not shape.divides_by_node:
        return resplit(counts, _packed(weighed, shape.ranks, shape.slots))
    return incremental(counts, _by_node(weighed, shape), moves_max=CROSS_NODE_MOVES * len(counts))


def resplit(counts: Array, slots: Array) -> ExpertMap:
    """The best split of each expert's tokens among the copies that there are: no expert moves."""
    return ExpertMap.shared(counts.shape[1], slots, split(floored(counts), slots))


def received(before: Array, after: Array) -> Array:
    """[layers, ranks]: experts that each rank gets and did not hold; a rank that is new receives all of its own."""
    layers, ranks, _ = after.shape
    experts = int(max(before.max(), after.max())) + 1
    held = np.zeros((2, layers, max(ranks, before.shape[1]), experts), dtype=bool)
    for which, slots in enumerate((before, after)):
        at = np.arange(layers)[:, None, None], np.arange(slots.shape[1])[None, :, None]
        held[which][(*at, slots)] = True
    return np.asarray((held[1] & ~held[0]).sum(-1)[:, :ranks])


def bound(counts: Array, shape: Shape) -> float:
    """Balance that no placement on these slots exceeds: a copy is never lighter than the best replication makes it."""
    weighed = floored(counts)
    heaviest = (weighed / _replicas(weighed, shape.slots, shape.ranks)).max(axis=1)
    means = weighed.sum(axis=1) / shape.ranks
    return float(means.sum() / np.maximum(means, heaviest).sum())


def layer_balance(placed: ExpertMap, counts: Array) -> Array:
    """[layers]: each layer's balance by itself."""
    loads = placed.loads(counts)
    return np.asarray(loads.mean(1) / np.maximum(loads.max(1), 1e-12))


def balance_of(placed: ExpertMap, counts: Array) -> float:
    """Balance by vLLM's definition, of the split that the engine really makes."""
    return balance(placed.loads(counts))


def _replicas(counts: Array, slots: int, ranks: int) -> Array:
    """[layers, experts]: copies of each expert. The expert with the heaviest copy gets the next (DeepSeek's EPLB)."""
    copies = np.ones(counts.shape)
    rows = np.arange(len(counts))
    for _ in range(slots - counts.shape[1]):
        hottest = np.where(copies < ranks, counts / copies, -1.0).argmax(axis=1)
        copies[rows, hottest] += 1
    return copies


def _packed(counts: Array, ranks: int, slots: int) -> Array:
    """Replicate, pack the heaviest copies first, each on the lightest rank without that expert, then exchange."""
    layers, experts = counts.shape
    copies = _replicas(counts, slots, ranks).astype(np.int64)
    weight = counts / copies
    order = np.argsort(-weight, axis=1, kind="stable")
    queue = np.stack([np.repeat(order[at], copies[at, order[at]]) for at in range(layers)])
    placed = np.full((layers, ranks, slots // ranks), -1)
    loads, filled = np.zeros((layers, ranks)), np.zeros((layers, ranks), dtype=np.int64)
    held = np.zeros((layers, ranks, experts), dtype=bool)
    rows = np.arange(layers)
    for expert in queue.T:
        closed = (filled == placed.shape[2]) | held[rows, :, expert]
        rank = np.where(closed, np.inf, loads).argmin(axis=1)
        for layer in np.flatnonzero(closed.all(axis=1)):
            rank[layer] = _make_room(
                placed[layer], held[layer], filled[layer], loads[layer], weight[layer], expert[layer]
            )
        placed[rows, rank, filled[rows, rank]] = expert
        held[rows, rank, expert] = True
        loads[rows, rank] += weight[rows, expert]
        filled[rows, rank] += 1
    _exchange(placed, held, weight)
    return placed


def _make_room(placed: Array, held: Array, filled: Array, loads: Array, weight: Array, expert: int) -> int:
    """Every rank with room holds ``expert`` already: move another rank's expert into that room. Of one layer."""
    width = placed.shape[1]
    room = int(np.flatnonzero(filled < width)[0])
    for giver in np.flatnonzero(~held[:, expert]):
        for slot in range(width):
            moved = placed[giver, slot]
            if not held[room, moved]:
                placed[room, filled[room]] = moved
                placed[giver, slot] = placed[giver, width - 1]
                held[giver, moved], held[room, moved] = False, True
                loads[giver] -= weight[moved]
                loads[room] += weight[moved]
                filled[giver] -= 1
                filled[room] += 1
                return int(giver)
    raise AssertionError("with at most one copy a rank there is always an expert to move")


def _exchange(slots: Array, held: Array, weight: Array) -> None:
    """Exchange an expert of the hottest rank with another rank's, best pair first, while that cools it. In place."""
    layers, ranks, width = slots.shape
    active = np.arange(layers)
    means = (weight[np.arange(layers)[:, None, None], slots]).sum((1, 2)) / ranks
    for _ in range(_EXCHANGES_MAX):
        parts = weight[active[:, None, None], slots[active]]
        loads = parts.sum(-1)
        rows = np.arange(len(active))
        hot = loads.argmax(axis=1)
        top = loads[rows, hot]
        best, mine, other = _best_exchange(slots[active], parts, loads, hot, held[active])
        good = (top > CLOSE_ENOUGH * means[active]) & (top - best > _GAIN_MIN * means[active])
        if not good.any():
            return
        active, hot, mine, other = active[good], hot[good], mine[good], other[good]
        rank, slot = other // width, other % width
        gone, come = slots[active, hot, mine], slots[active, rank, slot]
        slots[active, hot, mine], slots[active, rank, slot] = come, gone
        held[active, hot, gone] = held[active, rank, come] = False
        held[active, hot, come] = held[active, rank, gone] = True


def _best_exchange(slots: Array, parts: Array, loads: Array, hot: Array, held: Array) -> tuple[Array, Array, Array]:
    """By layer: the higher load of both ranks after the best exchange, the hot rank's slot, the other's flat slot."""
    layers, _, width = slots.shape
    rows = np.arange(layers)
    mine, others = slots[rows, hot], slots.reshape(layers, -1)
    given = parts[rows, hot][:, :, None] - parts.reshape(layers, 1, -1)
    there = np.repeat(loads, width, axis=1)[:, None, :]
    after = np.maximum(loads[rows, hot][:, None, None] - given, there + given)
    barred = np.repeat(held[rows[:, None], :, mine], width, axis=2)
    barred |= held[rows[:, None], hot[:, None], others][:, None, :]
    after[barred] = np.inf
    flat = after.reshape(layers, -1)
    chosen = flat.argmin(axis=1)
    return flat[rows, chosen], chosen // others.shape[1], chosen % others.shape[1]


def _by_node(counts: Array, shape: Shape) -> Array:
    """Groups packed to nodes, then each node solved as if it were a layer of its own."""
    layers, experts = counts.shape
    size = experts // shape.groups
    of_groups = counts.reshape(layers, shape.groups, size).sum(-1)
    groups = _packed(of_groups, shape.nodes, shape.groups)
    ids = (groups[..., None] * size + np.arange(size)).reshape(layers * shape.nodes, -1)
    there = np.repeat(counts, shape.nodes, axis=0)[np.arange(layers * shape.nodes)[:, None], ids]
    local = _packed(there, shape.ranks // shape.nodes, shape.slots // shape.nodes)
    rows = np.arange(layers * shape.nodes)[:, None, None]
    return np.asarray(ids[rows, local].reshape(layers, shape.ranks, -1))
