"""The prompts that a worker is still to compute, as far as plans and reports tell. Pure.

A report gives the tokens of all prompts that have no token yet. Engines compute prompts in the order of their coming:
when fewer tokens are reported than were sent, the oldest prompts are done.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

PlanKey = tuple[int, int]
"""The session of a front proxy, and its plan id."""


class _Prompt(msgspec.Struct, frozen=True, gc=False):
    planned_s: float
    tokens: int
    # How long its computation is predicted to take.
    compute_s: float


class PromptQueue:
    """Of one worker. Time is an argument and never goes back."""

    __slots__ = ("_compute_s", "_head_compute_s", "_head_s", "_prompts", "_reported_s", "unknown_tokens", "unreported")

    def __init__(self) -> None:
        self._prompts: dict[PlanKey, _Prompt] = {}
        self._compute_s = 0.0
        # Since when the oldest one is computed, and how long that is predicted to take.
        self._head_s = self._head_compute_s = 0.0
        # Prompts planned later are in no report yet.
        self._reported_s = float("-inf")
        self.unknown_tokens = 0
        """Reported tokens of prompts that no plan here explains: plans of others, or of a former scheduler."""
        self.unreported = 0
        """Prompts that no report includes yet."""

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[PlanKey]:
        return iter(self._prompts)

    def add(self, key: PlanKey, tokens: int, compute_s: float, now_s: float) -> None:
        """A prompt is sent there."""
        assert key not in self._prompts, key
        if not self._prompts:
            self._head_s, self._head_compute_s = now_s, compute_s
        self._prompts[key] = _Prompt(now_s, tokens, compute_s)
        self.unreported += now_s > self._reported_s
        self._compute_s += compute_s

    def drop(self, key: PlanKey, now_s: float) -> None:
        """Its plan is over. Idempotent."""
        if key in self._prompts:
            if next(iter(self._prompts)) == key:
                self._head_s = now_s
            self._remove(key)

    def reported(self, tokens: int, now_s: float, visible_after_s: float) -> None:
        """The worker has so many tokens to compute. Prompts planned in the last ``visible_after_s`` are not in it."""
        self._reported_s = now_s - visible_after_s
        if not self._prompts:
            self.unknown_tokens = tokens
            return
        seen = [(key, prompt) for key, prompt in self._prompts.items() if prompt.planned_s <= self._reported_s]
        self.unreported = len(self._prompts) - len(seen)
        left = sum([prompt.tokens for _, prompt in seen])
        for key, prompt in seen:
            if left - prompt.tokens < tokens:
                break
            left -= prompt.tokens
            self._remove(key)
            # Computed when it was expected, as far as that can be.
            self._head_s = min(now_s, self._head_s + prompt.compute_s)
        self.unknown_tokens = max(0, tokens - left)

    def wait_s(self, now_s: float) -> float:
        """Until all of the known ones are computed."""
        spent_s, head_s = now_s - self._head_s, self._head_compute_s
        if spent_s <= 0.0:
            return self._compute_s
        return self._compute_s - spent_s if spent_s < head_s else self._compute_s - head_s

    def _remove(self, key: PlanKey) -> None:
        gone = self._prompts.pop(key)
        self._compute_s -= gone.compute_s
        self.unreported -= gone.planned_s > self._reported_s
        head = next(iter(self._prompts.values()), None)
        if head is None:
            # A sum of floats does not come back to 0 by itself.
            self._compute_s = self._head_compute_s = 0.0
        else:
            self._head_compute_s = head.compute_s

    def check(self) -> None:
        """Assert that the sums are the sums of their parts."""
        assert self.unreported == sum(prompt.planned_s > self._reported_s for prompt in self._prompts.values())
        assert abs(self._compute_s - sum(prompt.compute_s for prompt in self._prompts.values())) < 1e-6
