"""Measures the steps of an engine, in its own process: what a step computed, and how long it took. Changes nothing.

Imports nothing of vLLM; ``engine.vllm.private`` hands in what vLLM's scheduler says. What vLLM itself tells of a step
leaves out the lengths of the contexts, and with one process for engine and model also the forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

STEP = "baton_step"
"""Under this key of the connector's statistics goes a step: [us, prompt tokens, pairs, decoding, their tokens]."""


class StepMeter:
    """A step lasts from the end of the one before, or from where its scheduling began after a rest."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._began_s: float | None = None

    def scheduling(self) -> None:
        """The engine looks for work."""
        if self._began_s is None:
            self._began_s = self._now_s()

    def ended(self, scheduled: Any, *, more: bool) -> list[int] | None:
        """The step of this vLLM SchedulerOutput is over; None if it computed nothing. ``more``: there is work left."""
        began_s, now_s = self._began_s, self._now_s()
        self._began_s = now_s if more else None
        if began_s is None or not scheduled.total_num_scheduled_tokens:
            return None
        return [round((now_s - began_s) * 1e6), *make_up(scheduled)]


def make_up(scheduled: Any) -> tuple[int, int, int, int]:
    """Prompt tokens, their pairs, decoding sequences and their tokens, of a vLLM SchedulerOutput.

    A prompt of which one token is left to compute is like a sequence that decodes. A sequence that decodes may compute
    several tokens, if it has drafts.
    """
    counts, new, cached = scheduled.num_scheduled_tokens, scheduled.scheduled_new_reqs, scheduled.scheduled_cached_reqs
    if scheduled.total_num_scheduled_tokens == len(counts):
        return 0, 0, len(counts), sum(cached.num_computed_tokens) + sum([one.num_computed_tokens for one in new])
    tokens = pairs = decoding = context = 0
    before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    before |= {one.req_id: one.num_computed_tokens for one in new}
    for request_id, count in counts.items():
        if count == 1 or request_id in scheduled.scheduled_spec_decode_tokens:
            decoding += 1
            context += before[request_id]
        else:
            tokens += count
            pairs += count * (2 * before[request_id] + count) // 2
    return tokens, pairs, decoding, context
