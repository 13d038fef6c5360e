"""Takes the best worker. Keeps no memory of whom it took before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.cluster.state import Worker
from scheduler.routing.profile import Random

# Scores closer than this are equal: the order of a float sum must not decide.
SCORE_TOLERANCE = 1e-9


class MaxScorePicker:
    """The highest score wins; chance decides between equals, so that equals share the work."""

    name: Final = "max_score"

    def pick(self, workers: Sequence[Worker], scores: Sequence[float], rng: Random | None) -> int:
        """Index of the winner."""
        least = max(scores) - SCORE_TOLERANCE
        best = [index for index, score in enumerate(scores) if score >= least]
        if len(best) == 1:
            return best[0]
        if rng is None:
            return min(best, key=lambda index: workers[index].worker_id)
        return best[int(rng.random() * len(best))]
