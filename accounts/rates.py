"""Token buckets: so much a minute, and a minute's worth at once. Holds no clock."""

from __future__ import annotations

BUCKETS = ("requests_per_minute", "prompt_tokens_per_minute", "output_tokens_per_minute")
Use = tuple[int, int, int]
"""Requests, prompt tokens and output tokens, in the order of BUCKETS; negative ones are given back."""


class Bucket:
    """Its level may fall below 0: what was held is corrected at the end, and output that began is not stopped."""

    __slots__ = ("_at_s", "_level", "name", "per_minute", "which")

    def __init__(self, name: str, per_minute: int, now_s: float) -> None:
        """Full."""
        self.name = name
        self.which = BUCKETS.index(name)
        """Of a Use, what it bounds."""
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What is in it."""
        if now_s > self._at_s:
            level = self._level + (now_s - self._at_s) * self.per_minute / 60
            self._level = min(self.per_minute, level)
            self._at_s = now_s
        return self._level

    def lacks_s(self, cost: int, now_s: float) -> float:
        """Time until ``cost`` may be taken; 0: now. One that is larger than the bucket may be when it is full."""
        lacks = min(self.per_minute, cost) - self.level(now_s)
        return lacks * 60 / self.per_minute if lacks > 0 else 0.0

    def take(self, cost: int, now_s: float) -> None:
        """Take it, or give back what is negative."""
        self._level = min(self.per_minute, self.level(now_s) - cost)

    def resized(self, per_minute: int, now_s: float) -> Bucket:
        """The same with another rate: what is missing from a full one stays missing."""
        missing = self.per_minute - self.level(now_s)
        bucket = Bucket(self.name, per_minute, now_s)
        bucket._level -= missing
        return bucket
