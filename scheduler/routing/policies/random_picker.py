"""Takes any worker. The baseline that a scoring profile has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Random


class RandomPicker:
    """Every worker is as likely as every other."""

    name: Final = "random"

    def pick(self, workers: Sequence[Worker], scores: Sequence[float], rng: Random | None) -> int:
        """Index of the winner."""
        if rng is None:
            return min(range(len(workers)), key=lambda index: workers[index].worker_id)
        return int(rng.random() * len(workers))
