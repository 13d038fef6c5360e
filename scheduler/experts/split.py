"""How each expert's tokens are split among its copies, so that the highest rank is as low as they allow. Pure numpy."""

from __future__ import annotations

import numpy as np

from engine.expert_map import Array, per_expert

_SPLIT_SWEEPS_MAX = 60
_SPLIT_TOLERANCE = 3e-4
# The height of a rank that is none: no tokens reach it. A power of two, of which sums and means are exact.
_ABSENT = 2.0**200


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
    loads = np.full((layers, ranks + 1), _ABSENT)
    loads[:, :-1] = parts[:, :-1].reshape(slots.shape).sum(-1)
    several, tables = _copies_of(counts, flat, copies)
    tolerance = _SPLIT_TOLERANCE * loads[:, :-1].sum(axis=1) / ranks
    # Of the flat arrays, to which these are views: taking and putting there is quicker, and is most of the time.
    all_parts, all_loads, tokens = parts.reshape(-1), loads.reshape(-1), counts[rows, several]
    experts = [
        (rows * parts.shape[1] + table, rows * loads.shape[1] + table // width, tokens[:, at : at + 1])
        for at, table in enumerate(tables)
    ]
    for _ in range(sweeps_max):
        before = loads.copy()
        for slot, rank, poured in experts:
            base = all_loads[rank] - all_parts[slot]
            part = _pour(poured, base)
            all_parts[slot] = part
            all_loads[rank] = base + part
        if (np.abs(loads - before).max(axis=1) < tolerance).all():
            break
    return np.asarray(parts[:, :-1].reshape(slots.shape))


def floored(counts: Array) -> Array:
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
    """Tokens [layers, 1] poured over ranks of height ``base`` [layers, copies]."""
    filled = np.sort(base, axis=1).cumsum(axis=1)
    filled += tokens
    # The level if the n lowest ranks get them all: least for those n that they do reach.
    filled /= np.arange(1, base.shape[1] + 1)
    return np.maximum(filled.min(axis=1, keepdims=True) - base, 0.0)
