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
