"""Which rank holds which experts: replicate the hot ones, pack, exchange, and split tokens among copies. Pure numpy.

``counts`` are tokens by [layer, logical expert]; ``slots`` are expert ids by [layer, rank, slot]. All layers are solved
side by side, so that one operation of numpy serves them all.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from engine.expert_map import Array, ExpertMap, balance, check_slots, per_expert

# A layer whose hottest rank is so close to the mean is left as it is.
CLOSE_ENOUGH = 1.002
_EXCHANGES_MAX = 600
# A gain below this part of the mean is not worth an exchange.
_GAIN_MIN = 2e-4
# A step must lower a layer's sum of squared loads by so much, in squared means. Ranks that share experts stand equally
# high after a split, so that a good step lowers them all a little, and the highest one hardly.
_SQUARES_MIN = 1e-5
_SPLIT_SWEEPS_MAX = 60
_STEP_SWEEPS_MAX = 6
_SPLIT_TOLERANCE = 3e-4
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
    floored = _floored(counts)
    if not by_node or not shape.divides_by_node:
        return resplit(counts, _packed(floored, shape.ranks, shape.slots))
    return incremental(counts, _by_node(floored, shape), moves_max=CROSS_NODE_MOVES * len(counts))


def resplit(counts: Array, slots: Array) -> ExpertMap:
    """The best split of each expert's tokens among the copies that there are: no expert moves."""
    return ExpertMap.shared(counts.shape[1], slots, split(_floored(counts), slots))


def incremental(counts: Array, slots: Array, *, moves_max: int, close_enough: float = CLOSE_ENOUGH) -> ExpertMap:
    """At most ``moves_max`` experts received, over all ranks and layers; the layers with most to gain go first.

    A step either overwrites a spare copy by one of an expert of the hottest rank (one receive), or exchanges two
    experts (two).
    """
    check_slots(slots, counts.shape[1])
    counts, slots, left = _floored(counts), slots.copy(), moves_max
    parts = split(counts, slots)
    means = counts.sum(axis=1) / slots.shape[1]
    layers = np.arange(len(counts))
    while left > 0 and len(layers):
        over = parts[layers].sum(-1).max(-1) - close_enough * means[layers]
        layers = layers[np.argsort(-over)][: int((over > 0).sum())][:left]
        if not len(layers):
            break
        tried, costs = _best_moves(counts[layers], slots[layers], parts[layers], left)
        split_again = split(counts[layers], tried, parts[layers], _STEP_SWEEPS_MAX)
        gain = (parts[layers].sum(-1) ** 2).sum(-1) - (split_again.sum(-1) ** 2).sum(-1)
        good = (costs > 0) & (gain > _SQUARES_MIN * means[layers] ** 2)
        good &= np.cumsum(np.where(good, costs, 0)) <= left
        left -= int(costs[good].sum())
        layers = layers[good]
        slots[layers], parts[layers] = tried[good], split_again[good]
    return ExpertMap.shared(counts.shape[1], slots, split(counts, slots, parts))


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
    floored = _floored(counts)
    heaviest = (floored / _replicas(floored, shape.slots, shape.ranks)).max(axis=1)
    means = floored.sum(axis=1) / shape.ranks
    return float(means.sum() / np.maximum(means, heaviest).sum())


def layer_balance(placed: ExpertMap, counts: Array) -> Array:
    """[layers]: each layer's balance by itself."""
    loads = placed.loads(counts)
    return np.asarray(loads.mean(1) / np.maximum(loads.max(1), 1e-12))


def balance_of(placed: ExpertMap, counts: Array) -> float:
    """Balance by vLLM's definition, of the split that the engine really makes."""
    return balance(placed.loads(counts))


def split(counts: Array, slots: Array, start: Array | None = None, sweeps_max: int = _SPLIT_SWEEPS_MAX) -> Array:
    """[layers, ranks, slots]: tokens for each slot, so that the highest load of a rank is as low as these slots allow.

    Water-filling, expert by expert: each pours its tokens where its ranks are lowest, until nothing changes. The sum of
    squared loads falls with each step, and its least point also has the least maximum (Federgruen, Groenevelt 1986).
    """
    layers, ranks, width = slots.shape
    flat = slots.reshape(layers, -1)
    rows = np.arange(layers)[:, None]
    copies = per_expert(slots, np.ones(slots.shape), counts.shape[1])
    share = counts / np.maximum(copies, 1)
    parts = np.concatenate([share[rows, flat], np.zeros((layers, 1))], axis=1)
    if start is not None:
        scale = counts / np.maximum(per_expert(slots, _kept(start, slots, share), counts.shape[1]), 1e-12)
        parts[:, :-1] = _kept(start, slots, share).reshape(layers, -1) * scale[rows, flat]
    loads = np.zeros((layers, ranks + 1))
    loads[:, :-1] = parts[:, :-1].reshape(slots.shape).sum(-1)
    several, tables = _copies_of(counts, flat, copies)
    tolerance = _SPLIT_TOLERANCE * loads.sum(axis=1) / ranks
    for _ in range(sweeps_max):
        before = loads.copy()
        for at, table in enumerate(tables):
            on = table // width
            absent = on == ranks
            base = np.where(absent, np.inf, loads[rows, on] - parts[rows, table])
            poured = _pour(counts[rows, several[:, at : at + 1]], base)
            parts[rows, table] = poured
            loads[rows, on] = np.where(absent, 0.0, base + poured)
        if (np.abs(loads - before).max(axis=1) < tolerance).all():
            break
    return np.asarray(parts[:, :-1].reshape(slots.shape))


def _floored(counts: Array) -> Array:
    """No expert is free: one that was never routed to would else be copied as if that helped."""
    counts = counts.astype(np.float64)
    return counts + 1e-6 * counts.mean(axis=1, keepdims=True) + 1e-9


def _kept(start: Array, slots: Array, share: Array) -> Array:
    """``start``, with a new copy's tokens guessed where it was zero for want of a copy."""
    rows = np.arange(len(slots))[:, None, None]
    return np.where(start > 0, start, 1e-3 * share[rows, slots])


def _copies_of(counts: Array, flat: Array, copies: Array) -> tuple[Array, list[Array]]:
    """Experts with several copies, the heaviest first: their ids [layers, n], and n tables [layers, copies] of slots.

    Where a layer has fewer experts or copies, a table names the slot beyond the last.
    """
    layers, slots = flat.shape
    order = np.argsort(np.where(copies > 1, -counts, np.inf), axis=1, kind="stable")
    count = int((copies > 1).sum(axis=1).max())
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), 1)
    by_expert = np.argsort(flat, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(flat, by_expert, 1)
    first = np.cumsum(copies, axis=1) - copies
    which = (np.arange(slots) - np.take_along_axis(first, sorted_ids, 1)).astype(np.int64)
    table = np.full((layers, counts.shape[1], int(copies.max())), slots)
    table[np.arange(layers)[:, None], np.take_along_axis(place, sorted_ids, 1), which] = by_expert
    table[np.take_along_axis(copies, order, 1) < 2] = slots
    widths = (table[:, :count] < slots).any(axis=0).sum(axis=1)
    return order[:, :count], [table[:, at, : widths[at]] for at in range(count)]


def _pour(tokens: Array, base: Array) -> Array:
    """Tokens [layers, 1] poured over ranks of height ``base`` [layers, copies]; infinite: no rank."""
    ordered = np.sort(base, axis=1)
    filled = np.cumsum(np.where(np.isinf(ordered), 0.0, ordered), axis=1)
    level = (tokens + filled) / np.arange(1, base.shape[1] + 1)
    above = np.concatenate([ordered[:, 1:], np.full((len(base), 1), np.inf)], axis=1)
    chosen = np.argmax(level <= above, axis=1)[:, None]
    return np.maximum(np.take_along_axis(level, chosen, 1) - base, 0.0)


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


def _best_moves(counts: Array, slots: Array, parts: Array, left: int) -> tuple[Array, Array]:
    """Each layer's slots after the step that cools its hottest rank most a receive, and the receives (0: no step)."""
    layers, ranks, width = slots.shape
    experts = counts.shape[1]
    rows = np.arange(layers)
    held = np.zeros((layers, ranks, experts), dtype=bool)
    held[rows[:, None, None], np.arange(ranks)[None, :, None], slots] = True
    loads = parts.sum(-1)
    hot = loads.argmax(axis=1)
    top = loads[rows, hot]
    best, mine, other = _best_exchange(slots, parts, loads, hot, held)
    gain_exchange = (top - best) / 2 if left >= 2 else np.full(layers, -np.inf)
    best, mine_over, over = _best_overwrite(slots, parts, loads, hot, held)
    gain_overwrite = top - best
    overwrite = gain_overwrite >= gain_exchange
    gain = np.where(overwrite, gain_overwrite, gain_exchange)
    tried, costs = slots.copy(), np.where(gain > 0, np.where(overwrite, 1, 2), 0)
    mine, other = np.where(overwrite, mine_over, mine), np.where(overwrite, over, other)
    rank, slot = other // width, other % width
    gone, come = slots[rows, hot, mine], slots[rows, rank, slot]
    moving, both = costs > 0, costs == 2
    tried[rows[moving], rank[moving], slot[moving]] = gone[moving]
    tried[rows[both], hot[both], mine[both]] = come[both]
    return tried, costs


def _best_overwrite(slots: Array, parts: Array, loads: Array, hot: Array, held: Array) -> tuple[Array, Array, Array]:
    """As ``_best_exchange``, for a copy of a hot expert that takes the slot of an expert with other copies."""
    layers, _, width = slots.shape
    rows = np.arange(layers)
    mine, others = slots[rows, hot], slots.reshape(layers, -1)
    spare = np.take_along_axis(held.sum(axis=1), others, 1) - 1
    flat = parts.reshape(layers, -1)
    there = np.repeat(loads, width, axis=1)
    top = loads[rows, hot][:, None, None]
    room = (there - flat)[:, None, :]
    taken = np.minimum((top - room) / 2, parts[rows, hot][:, :, None])
    # The other copies of an overwritten expert stand as high as this rank, where it has a part here at all.
    elsewhere = np.where(flat > 0, there + flat / np.maximum(spare, 1), 0.0)[:, None, :]
    after = np.maximum(np.maximum(top - taken, room + taken), elsewhere)
    barred = np.repeat(held[rows[:, None], :, mine], width, axis=2) | (spare < 1)[:, None, :]
    after[barred] = np.inf
    whole = after.reshape(layers, -1)
    chosen = whole.argmin(axis=1)
    return whole[rows, chosen], chosen // others.shape[1], chosen % others.shape[1]


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
