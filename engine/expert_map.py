"""Which expert each slot of a group of ranks holds, and how an expert's tokens are split over its copies. Pure.

Scheduler and engines share this: one check of what is valid, one digest, one form on the wire.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

# An expert's tokens are spread evenly over so many columns, and each column leads to one of its slots.
COLUMNS = 256


class BadExpertMap(ValueError):
    """A map that must not be applied. Its message names the layer and the expert."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertMap:
    """One placement. It is checked when it is made, so every one that exists is valid.

    ``slots``: [layers, ranks, slots of a rank], logical expert ids. ``columns``: the same shape, how many of its
    expert's COLUMNS lead to the slot. Every expert has a slot in every layer, and no rank holds one twice.
    Raises BadExpertMap.
    """

    experts: int
    slots: Array
    columns: Array

    def __post_init__(self) -> None:
        if self.slots.ndim != 3 or self.slots.shape != self.columns.shape:
            raise BadExpertMap(f"slots are {self.slots.shape}, columns {self.columns.shape}: both need 3 dimensions")
        check_slots(self.slots, self.experts)
        whole = per_expert(self.slots, self.columns, self.experts)
        if (self.columns < 0).any() or (whole != COLUMNS).any():
            layer, expert = np.argwhere((whole != COLUMNS) | (_least(self) < 0))[0]
            raise BadExpertMap(f"layer {layer}: expert {expert} has {whole[layer, expert]:.0f} columns, not {COLUMNS}")

    @functools.cached_property
    def digest(self) -> int:
        """63 bits over shape, slots and columns: two ranks with equal digests hold the same map."""
        shape = np.array([self.experts, *self.slots.shape], "<u4").tobytes()
        whole = hashlib.sha256(shape + self.slots_bytes + self.columns_bytes).digest()
        return int.from_bytes(whole[:8], "big") >> 1

    @property
    def slots_bytes(self) -> bytes:
        """The slots as little-endian 16-bit numbers, layer by layer, rank by rank."""
        return bytes(self.slots.astype("<u2").tobytes())

    @property
    def columns_bytes(self) -> bytes:
        """The columns in the form of ``slots_bytes``."""
        return bytes(self.columns.astype("<u2").tobytes())

    @classmethod
    def parse(cls, experts: int, layers: int, ranks: int, slots: bytes, columns: bytes) -> ExpertMap:
        """Read what ``slots_bytes`` and ``columns_bytes`` gave. Raises BadExpertMap."""
        if layers < 1 or ranks < 1 or len(slots) != len(columns) or not slots or len(slots) % (2 * layers * ranks):
            raise BadExpertMap(f"{len(slots)} bytes are no whole slots of {layers} layers on {ranks} ranks")
        read = [np.frombuffer(raw, "<u2").reshape(layers, ranks, -1).astype(np.int32) for raw in (slots, columns)]
        return cls(experts, *read)

    @classmethod
    def shared(cls, experts: int, slots: Array, parts: Array | None = None) -> ExpertMap:
        """A map whose columns follow ``parts``, the tokens that each slot is to get; None: equal parts."""
        check_slots(slots, experts)
        wanted = np.ones(slots.shape) if parts is None else parts
        return cls(experts, slots.astype(np.int32), _columns(slots, wanted, experts))

    def physical(self) -> Array:
        """[layers, experts, COLUMNS]: the physical slot that each column of an expert leads to."""
        layers = len(self.slots)
        flat, times = self.slots.reshape(layers, -1), self.columns.reshape(layers, -1)
        order = np.argsort(flat, axis=1, kind="stable")
        rows: list[Array] = [np.repeat(order[layer], times[layer, order[layer]]) for layer in range(layers)]
        return np.stack(rows).reshape(layers, self.experts, COLUMNS)

    def loads(self, counts: Array) -> Array:
        """[layers, ranks]: tokens that each rank computes of ``counts`` [layers, experts]."""
        layers = np.arange(len(self.slots))[:, None, None]
        return np.asarray((counts[layers, self.slots] * self.columns).sum(-1) / COLUMNS)


def check_slots(slots: Array, experts: int) -> None:
    """Raise BadExpertMap, with layer and expert, where an expert is missing, unknown, or twice on one rank."""
    if ((slots < 0) | (slots >= experts)).any():
        layer, rank, slot = np.argwhere((slots < 0) | (slots >= experts))[0]
        raise BadExpertMap(f"layer {layer}: rank {rank} holds expert {slots[layer, rank, slot]} of {experts}")
    ordered = np.sort(slots, axis=2)
    if (twice := ordered[..., 1:] == ordered[..., :-1]).any():
        layer, rank, slot = np.argwhere(twice)[0]
        raise BadExpertMap(f"layer {layer}: rank {rank} holds expert {ordered[layer, rank, slot]} twice")
    if (missing := per_expert(slots, np.ones(slots.shape), experts) == 0).any():
        layer, expert = np.argwhere(missing)[0]
        raise BadExpertMap(f"layer {layer}: no rank holds expert {expert}")


def per_expert(slots: Array, values: Array, experts: int) -> Array:
    """[layers, experts]: the sum of ``values`` (shape of ``slots``) over each expert's slots."""
    layers = len(slots)
    keys = slots.reshape(layers, -1) + experts * np.arange(layers)[:, None]
    summed = np.bincount(keys.ravel(), weights=values.ravel(), minlength=layers * experts)
    return summed.reshape(layers, experts)


def balance(loads: Array) -> float:
    """Mean load of a rank over the highest, of all layers, as vLLM's EPLB defines it; 1 is perfect.

    ``loads``: [layers, ranks].
    """
    highest = loads.max(axis=1).sum()
    return float(loads.mean(axis=1).sum() / highest) if highest else 1.0


def _columns(slots: Array, parts: Array, experts: int) -> Array:
    """Whole columns in proportion to ``parts``: the largest remainders get what rounding down leaves."""
    layers = len(slots)
    flat = slots.reshape(layers, -1)
    of_slot = np.take_along_axis
    total = per_expert(slots, parts, experts)
    copies = per_expert(slots, np.ones(slots.shape), experts)
    equal = 1.0 / of_slot(copies, flat, 1)
    whole = of_slot(total, flat, 1)
    exact = COLUMNS * np.where(whole > 0, parts.reshape(layers, -1) / np.where(whole > 0, whole, 1), equal)
    down = np.floor(exact + 1e-9)
    left = COLUMNS - per_expert(slots, down, experts)
    order = np.lexsort((down - exact, flat), axis=1)
    first = np.cumsum(copies, axis=1) - copies
    place = np.arange(flat.shape[1]) - of_slot(first, of_slot(flat, order, 1), 1)
    more = np.zeros_like(flat)
    np.put_along_axis(more, order, place < of_slot(left, of_slot(flat, order, 1), 1), 1)
    return np.asarray((down + more).reshape(slots.shape).astype(np.int32))


def _least(placed: ExpertMap) -> Array:
    """[layers, experts]: the fewest columns of any of its slots."""
    least = np.full((len(placed.slots), placed.experts), COLUMNS)
    np.minimum.at(least, (np.arange(len(placed.slots))[:, None, None], placed.slots), placed.columns)
    return least
