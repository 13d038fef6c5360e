"""How urgent a request is. The wire has these words (scheduler.proto) and inference.proto's enum of the same names."""

from __future__ import annotations

import enum


class PriorityClass(enum.StrEnum):
    """By how much a request goes before others; the most urgent first."""

    INTERACTIVE = "interactive"
    DEFAULT = "default"
    BATCH = "batch"


def class_of_priority(priority: int) -> PriorityClass:
    """The class that a priority number means, as vLLM counts: lower is earlier."""
    if priority == 0:
        return PriorityClass.DEFAULT
    return PriorityClass.INTERACTIVE if priority < 0 else PriorityClass.BATCH


def named_class(name: str, priority: int) -> PriorityClass:
    """The class that a request names, else the one that its number means."""
    return _BY_NAME.get(name) or class_of_priority(priority)


def engine_priority(name: str, priority: int) -> int:
    """The number that an engine orders by: first the class, and within it the request's own; lower is earlier."""
    within = min(_WITHIN_MAX, max(-_WITHIN_MAX, priority))
    return _CLASS_STEP * _RANKS[named_class(name, priority)] + within


_BY_NAME = {one.value: one for one in PriorityClass}
_RANKS = {PriorityClass.INTERACTIVE: -1, PriorityClass.DEFAULT: 0, PriorityClass.BATCH: 1}
# All sums are numbers of 32 bits, and no class reaches into another.
_CLASS_STEP = 2**30
_WITHIN_MAX = 2**29 - 1
