"""Guesses which blocks an engine without events holds, from the prompts that were routed to it. Pure.

Fills the same index as ``block_feed``, so that one query serves both.
"""

from __future__ import annotations

from collections.abc import Collection

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import GONE, Medium
from scheduler.routing.prefix_index import PrefixIndex


class _Generations:
    """Blocks of one holder: used in this half of the time to live, and in the one before."""

    def __init__(self, blocks_max: int, now_s: float) -> None:
        self.blocks_max = blocks_max
        self.since_s = now_s
        self.young: set[int] = set()
        self.old: set[int] = set()


class RoutedBlocks:
    """A block is forgotten ``ttl_s / 2`` to ``ttl_s`` after the last prompt with it, or sooner for want of room."""

    def __init__(self, index: PrefixIndex, *, ttl_s: float) -> None:
        assert ttl_s > 0
        self._index = index
        self._half_s = ttl_s / 2
        self._holders: dict[int, _Generations] = {}

    def add(self, blocks_max: int, now_s: float) -> int:
        """A new holder, whose engine has room for so many blocks."""
        holder = self._index.add()
        self._holders[holder] = _Generations(blocks_max, now_s)
        return holder

    def retire(self, holder: int) -> None:
        """It is gone."""
        del self._holders[holder]
        self._index.retire(holder)

    def routed(self, holder: int, packed: bytes, now_s: float) -> None:
        """A prompt with these keys runs there."""
        generations = self._holders[holder]
        keys = block_keys.unpack(packed)[: generations.blocks_max // 2]
        self._age(holder, generations, now_s)
        if len(generations.young) + len(keys) > generations.blocks_max // 2:
            self._turn(holder, generations, now_s)
        generations.young.update(keys)
        if not self._index.put(holder, Medium.HBM, keys):
            self._forget(holder, generations.old | generations.young)
            generations.old, generations.young = set(), set()

    def expire(self, now_s: float) -> None:
        """Forget what is due. Call it several times within ``ttl_s``."""
        for holder, generations in self._holders.items():
            self._age(holder, generations, now_s)

    def _age(self, holder: int, generations: _Generations, now_s: float) -> None:
        for _ in range(min(2, int((now_s - generations.since_s) / self._half_s))):
            self._turn(holder, generations, now_s)

    def _turn(self, holder: int, generations: _Generations, now_s: float) -> None:
        """The young become the old. A prompt is used whole, so what stays is closed."""
        self._forget(holder, generations.old - generations.young)
        generations.old, generations.young, generations.since_s = generations.young, set(), now_s

    def _forget(self, holder: int, keys: Collection[int]) -> None:
        self._index.put(holder, GONE, keys)
