"""Where a pure decision gets its chance from: an argument, so that a test or a simulation can repeat it."""

from __future__ import annotations

from typing import Protocol


class Random(Protocol):
    """The part of ``random.Random`` that decisions need."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...
