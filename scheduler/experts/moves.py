"""The few experts whose moves bring a live placement closest to balance. Pure numpy.

A search in each layer, all layers side by side. A step takes an expert of one of the hottest ranks and a slot of a rank
with room: it overwrites a copy there that its expert can spare, or exchanges both. What a step gains is guessed, then
the tokens are split anew, and a step that gains too little is taken back.

A move costs what differs from the beginning: an expert that was received already may be exchanged again for nothing.
It has a price, at first a high one. In the end each layer gets the state of its search that is best for the budget.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.expert_map import Array, ExpertMap, check_slots, per_expert
from scheduler.experts.split import floored, split

# A layer whose hottest rank is so close to the mean is left as it is.
CLOSE_ENOUGH = 1.002
# What a step chooses from, in each layer: so many ranks' experts, and all slots but so many of the fullest ranks.
_HOT_RANKS_MAX, _SLOTS_LEFT_OUT_MAX = 7, 144
_STEP_SWEEPS_MAX = 3
# A layer searches for so much more than its part of the budget: others may need less, which is known only then.
_BEYOND = 1.15
_STEPS_A_MOVE_MAX = 3
# What a move must gain: less each time that a layer finds no step. In squared means of a rank, as all gains here.
_PRICE_MAX, _PRICE_MIN, _CHEAPER = 0.05, 5e-7, 0.5
_GAIN_MIN = 1e-6
# Loads below the goal count a little, so that they even out too.
_BELOW = 1e-3


def incremental(counts: Array, slots: Array, *, moves_max: int, close_enough: float = CLOSE_ENOUGH) -> ExpertMap:
    """At most ``moves_max`` experts received, over all ranks and layers, in those layers that gain most by them."""
    check_slots(slots, counts.shape[1])
    counts = floored(counts)
    search = _Search(counts, slots, moves_max, close_enough)
    trail = [search.state()]
    active = np.arange(len(counts))
    for _ in range(_STEPS_A_MOVE_MAX * search.moves_max):
        active = active[search.loads[active].max(axis=1) > close_enough]
        if not len(active):
            break
        active = search.step(active)
        trail.append(search.state())
    found = _within(trail, moves_max)
    return ExpertMap.shared(counts.shape[1], found, split(counts, found))


class _State(NamedTuple):
    """Of each layer: moves so far, the highest load, and the slots."""

    moves: Array
    highest: Array
    slots: Array


class _Steps(NamedTuple):
    """A step of each layer: slots after it, moves that it costs, the slot that it fills, and whether there is one."""

    tried: Array
    cost: Array
    slot: Array
    some: Array


class _Search:
    """All layers. Loads and parts are in means of a rank."""

    def __init__(self, counts: Array, slots: Array, moves_max: int, goal: float) -> None:
        layers, ranks, width = slots.shape
        self.moves_max = min(moves_max, int(_BEYOND * moves_max / layers) + 2)
        """Of one layer."""
        self._goal = goal
        self._counts = counts / (counts.sum(axis=1, keepdims=True) / ranks)
        self._slots = slots.copy()
        self._parts = split(self._counts, slots)
        self.loads = self._parts.sum(-1)
        self._held_first = _held(slots, counts.shape[1])
        self._held = self._held_first.copy()
        self._moves = np.zeros(layers, dtype=np.int64)
        self._price = np.full(layers, _PRICE_MAX)
        # Slots with which a step gained too little, until another one does better.
        self._barred = np.zeros((layers, ranks * width), dtype=bool)

    def state(self) -> _State:
        """As it is now."""
        return _State(self._moves.copy(), self.loads.max(axis=1), self._slots.copy())

    def step(self, active: Array) -> Array:
        """Try the best step of each of these layers; returns the layers that may have more."""
        tried, cost, slot, some = self._best(active)
        parts = split(self._counts[active], tried, self._parts[active], _STEP_SWEEPS_MAX)
        gain = self._height(self.loads[active]).sum(axis=1) - self._height(parts.sum(-1)).sum(axis=1)
        good = some & (gain > self._price[active] * cost + _GAIN_MIN)
        bad = some & ~good
        self._barred[active[bad], slot[bad]] = True
        self._barred[active[~bad]] = False
        self._price[active[~some]] *= _CHEAPER
        better = active[good]
        self._slots[better], self._parts[better] = tried[good], parts[good]
        self._held[better] = _held(tried[good], self._counts.shape[1])
        self.loads[better] = parts[good].sum(-1)
        self._moves[better] += cost[good]
        # Without moves that are left the price means nothing.
        return active[some | (self._moves[active] < self.moves_max) & (self._price[active] > _PRICE_MIN)]

    def _height(self, loads: Array) -> Array:
        """What is to be little: what stands above the goal, squared."""
        return np.maximum(loads - self._goal, 0) ** 2 + _BELOW * loads**2

    def _best(self, active: Array) -> _Steps:
        layers, ranks, width = self._slots[active].shape
        rows, flat = np.arange(layers), self._slots[active].reshape(layers, -1)
        held = self._held[active]
        gives, takes = self._hot(active), self._roomy(active, flat, held)
        given, taken = flat[rows[:, None], gives], flat[rows[:, None], takes]
        # Where the given expert would come, and where the taken one would go.
        experts = self._counts.shape[1]
        base = (rows * ranks * experts)[:, None, None]
        come = base + (takes // width * experts)[:, None, :] + given[:, :, None]
        back = base + (gives // width * experts)[:, :, None] + taken[:, None, :]
        first = self._held_first[active]
        here = rows[:, None]
        cost = 1 - first.ravel()[come].astype(np.int8) - ~first[here, takes // width, taken][:, None, :]
        cost_back = 1 - first.ravel()[back].astype(np.int8) - ~first[here, gives // width, given][:, :, None]
        over, swap = self._gains(active, gives, takes, held)
        twice = held.ravel()[come]
        price = self._price[active].astype(np.float32)[:, None, None]
        left = (self.moves_max - self._moves[active])[:, None, None]
        over = np.where(twice | (cost > left), -np.inf, over - price * cost)
        cost_back += cost
        swap = np.where(twice | held.ravel()[back] | (cost_back > left), -np.inf, swap - price * cost_back)
        exchange = (swap > over).reshape(layers, -1)
        value = np.maximum(swap, over).reshape(layers, -1)
        best = value.argmax(axis=1)
        some = value[rows, best] > _GAIN_MIN
        both = exchange[rows, best]
        costs = np.where(both, cost_back.reshape(layers, -1)[rows, best], cost.reshape(layers, -1)[rows, best])
        mine, other = gives[rows, best // takes.shape[1]], takes[rows, best % takes.shape[1]]
        tried, both = flat.copy(), both & some
        tried[rows[some], other[some]] = flat[rows[some], mine[some]]
        tried[rows[both], mine[both]] = flat[rows[both], other[both]]
        return _Steps(tried.reshape(layers, ranks, width), costs, other, some)

    def _hot(self, active: Array) -> Array:
        """[layers, n]: the slots of the hottest ranks."""
        width = self._slots.shape[2]
        hottest = np.argsort(-self.loads[active], axis=1, kind="stable")[:, :_HOT_RANKS_MAX]
        return np.asarray((hottest[:, :, None] * width + np.arange(width)).reshape(len(active), -1))

    def _roomy(self, active: Array, flat: Array, held: Array) -> Array:
        """[layers, n]: the slots of ranks that are lowest, without the slot's part where that may go elsewhere."""
        spare = np.take_along_axis(held.sum(axis=1), flat, 1) > 1
        there = np.repeat(self.loads[active], self._slots.shape[2], axis=1)
        room = there - np.where(spare, self._parts[active].reshape(flat.shape), 0.0)
        room[self._barred[active]] = np.inf
        some = flat.shape[1] - min(_SLOTS_LEFT_OUT_MAX, flat.shape[1] // 2)
        return np.argpartition(room, some - 1, axis=1)[:, :some]

    def _gains(self, active: Array, gives: Array, takes: Array, held: Array) -> tuple[Array, Array]:
        """[layers, gives, takes]: guesses of what it gains to overwrite, and to exchange; barred: infinitely little."""
        rows, width = np.arange(len(active))[:, None], self._slots.shape[2]
        flat = self._slots[active].reshape(len(active), -1)
        loads, parts = self.loads[active].astype(np.float32), self._parts[active].astype(np.float32)
        given, slot_parts = flat[rows, gives], parts.reshape(flat.shape)
        copies = held.sum(axis=1)
        pouring = np.maximum(per_expert(self._slots[active], parts > 0, held.shape[2]), 1)
        top, low = loads[rows, gives // width][:, :, None], loads[rows, takes // width][:, None, :]
        mine, part = slot_parts[rows, gives][:, :, None], slot_parts[rows, takes][:, None, :]
        before = self._height(top) + self._height(low)
        # All copies with tokens stand equally high.
        tokens = np.where(mine > 0, self._counts[active].astype(np.float32)[rows, given][:, :, None], 0)
        by = pouring[rows, given].astype(np.float32)[:, :, None]
        poured = np.clip((top - low + part) * by / (by + 1), 0, tokens)
        level = self._elsewhere(flat, copies, np.repeat(loads, width, axis=1))[rows, takes][:, None, :]
        over = by * (self._height(top) - self._height(top - poured / by))
        over += self._height(low) - self._height(low - part + poured)
        # What the slot's expert did here goes to its lowest other copy, which may have been cooled just now.
        level = np.minimum(level, top - poured / by)
        over -= self._height(level + part) - self._height(level)
        moved = mine - part
        swap = before - self._height(top - moved) - self._height(low + moved)
        barred = self._barred[active][rows, takes][:, None, :]
        alone = copies[rows, flat[rows, takes]][:, None, :] < 2
        return np.where(barred | alone, -np.inf, over), np.where(barred, -np.inf, swap)

    @staticmethod
    def _elsewhere(flat: Array, copies: Array, there: Array) -> Array:
        """[layers, slots]: the load of the lowest rank with another copy of the slot's expert; 0: there is none."""
        order = np.lexsort((there, flat), axis=1)
        at = np.take_along_axis(np.cumsum(copies, axis=1) - copies, flat, 1)
        lowest = np.take_along_axis(order, at, 1)
        second = np.take_along_axis(order, np.minimum(at + 1, flat.shape[1] - 1), 1)
        other = np.where(lowest == np.arange(flat.shape[1]), second, lowest)
        return np.where(np.take_along_axis(copies, flat, 1) < 2, 0, np.take_along_axis(there, other, 1))


def _within(trail: list[_State], moves_max: int) -> Array:
    """Slots of one state of each layer, so that the sum of their highest loads is as low as the budget allows."""
    moves, highest = np.stack([state.moves for state in trail]), np.stack([state.highest for state in trail])
    layers = np.arange(moves.shape[1])
    # At a price of a move each layer has a best state; with the right price they cost the budget.
    low, high = 0.0, float(highest.max())
    for _ in range(40):
        price = (low + high) / 2
        fits = moves[(highest + price * moves).argmin(axis=0), layers].sum() <= moves_max
        low, high = (low, price) if fits else (price, high)
    chosen = (highest + high * moves).argmin(axis=0)
    return np.stack([trail[at].slots[layer] for layer, at in enumerate(chosen)])


def _held(slots: Array, experts: int) -> Array:
    """[layers, ranks, experts]: whether a rank holds an expert."""
    layers, ranks, _ = slots.shape
    held = np.zeros((layers, ranks, experts), dtype=bool)
    held[np.arange(layers)[:, None, None], np.arange(ranks)[None, :, None], slots] = True
    return held
